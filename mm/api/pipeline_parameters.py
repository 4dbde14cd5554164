"""Parameters of a pipeline's call, as people who script DiffSynth-Studio's know them, and what models take which."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.api.pipeline_values import value_problems
from mm.config.data import TEMPORAL_STRIDE
from mm.config.rules.sampling import tea_cache_problems, window_problems
from mm.config.run.generation import TeaCacheModel
from mm.config.run.listed import every_list_of
from mm.config.tasks.registry import TASKS
from mm.config.tasks.task import Source, Task
from mm.errors import ConfigError, Problem, raise_all
from mm.generate.sampling import SamplingOptions
from mm.generate.tea_cache import COEFFICIENTS
from mm.poses import ORIGIN, SPEED

log = logging.getLogger(__name__)

BOUNDARY = 0.875
"""Noise level between two experts where nothing says it, as DiffSynth-Studio has it."""
Frames = Sequence[Image.Image]
"""A video: its frames, all of one size."""


@dataclass(frozen=True, kw_only=True)
class ClipParameters:
    """Parameters of one clip.

    Attributes:
        input_image, end_image: its first and last frame, of models that take them.
        input_video, denoising_strength: what it is made from, and how much of that is made anew, above 0 to 1.
        control_video: what it follows frame by frame. reference_image: what is to be seen in it.
        camera_control_direction, camera_control_speed, camera_control_origin: how the camera moves: a direction such as
            "LeftUp", the number by which frames differ, the first frame's row (`mm.poses`).
        vace_video, vace_video_mask, vace_reference_image, vace_scale: what is edited, white where it is made anew, what
            is to be seen in it (one or several), and a factor on all of that.
        seed: of the noise; None takes another one each time. rand_device: "cpu" alone.
        height, width, num_frames: rounded up, to 4k + 1 frames, with a word about it.
        cfg_scale: of guidance; exactly 1 leaves the negative prompt out. cfg_merge: both prompts in one pass.
        num_inference_steps, sigma_shift: of Euler's method.
        switch_DiT_boundary: of two experts, the noise level from which on the first is asked; None takes what the
            folder of diffusers records, and 0.875 where nothing does. Wan2.2's I2V-A14B was trained with 0.9.
        motion_bucket_id: how much moves, from 0 to 100, of models with speed control.
        tiled, tile_size, tile_stride: the VAE works in overlapping tiles of so many latent pixels.
        tea_cache_l1_thresh, tea_cache_model_id: steps without blocks, and the model by which they are found.
        sliding_window_size, sliding_window_stride: latent frames that are seen at a time (`docs/inference.md`).
        progress_bar_cmd: wraps the steps to show progress; None shows tqdm's bar, `lambda steps: steps` none.
    """

    input_image: Image.Image | None = None
    end_image: Image.Image | None = None
    input_video: Frames | None = None
    denoising_strength: float = 1.0
    control_video: Frames | None = None
    reference_image: Image.Image | None = None
    camera_control_direction: str | None = None
    camera_control_speed: float = SPEED
    camera_control_origin: Sequence[float] = ORIGIN
    vace_video: Frames | None = None
    vace_video_mask: Frames | None = None
    vace_reference_image: Image.Image | Sequence[Image.Image] | None = None
    vace_scale: float = 1.0
    seed: int | None = None
    rand_device: str = "cpu"
    height: int = 480
    width: int = 832
    num_frames: int = 81
    cfg_scale: float = 5.0
    cfg_merge: bool = False
    num_inference_steps: int = 50
    sigma_shift: float = 5.0
    switch_DiT_boundary: float | None = None  # noqa: N815  (that system's name)
    motion_bucket_id: float | None = None
    tiled: bool = False
    tile_size: Sequence[int] = (30, 52)
    tile_stride: Sequence[int] = (15, 26)
    tea_cache_l1_thresh: float | None = None
    tea_cache_model_id: str = ""
    sliding_window_size: int | None = None
    sliding_window_stride: int | None = None
    progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None = None

    @classmethod
    def of(
        cls, given: Mapping[str, Any], task: Task, prompts: Mapping[str, Any] | None = None, *, experts: bool = False
    ) -> ClipParameters:
        """Parameters from a call's words, for models of a task.

        Args:
            given: what a call says. task: the model's. prompts: the two texts, by their names.
            experts: there are two transformers.

        Raises:
            ConfigError: CFG-121 for a strength of no video, CFG-321 to CFG-323 for TeaCache and sliding windows,
                CFG-405 for a rand_device, CFG-406 for a parameter that there is not, CFG-407 for one that models of the
                task do not take, CFG-446 for values that a parameter cannot have; all at once.
        """
        known = [field.name for field in fields(cls)]
        problems = [_unknown(name, known) for name in given if name not in known]
        wrong = list(value_problems({**(prompts or {}), **given}))
        found = cls(**{name: value for name, value in given.items() if name in known})
        problems += [*wrong, *_of_model(found, task)]
        if found.switch_DiT_boundary is not None and not experts:
            what = "switch_DiT_boundary is given, and there is one transformer."
            problems.append(Problem("CFG-407", what, "Leave it out, or name both experts in model_configs."))
        if not wrong:  # what follows compares values
            problems += _together(found, task)
        raise_all(ConfigError, problems)
        for line in _without_effect(found, {**(prompts or {}), **given}):
            log.warning("%s", line)
        return found

    @property
    def options(self) -> SamplingOptions:
        """Options of sampling; a video's clip takes all steps, as there."""
        threshold, size, stride = self.tea_cache_l1_thresh, self.sliding_window_size, self.sliding_window_stride
        return SamplingOptions(
            tea_cache=None if threshold is None else (threshold, cast(TeaCacheModel, self.tea_cache_model_id)),
            windows=None if size is None or stride is None else (size, stride),
            strength_steps="last" if self.input_video is None else "all",
        )

    @property
    def shows_images(self) -> bool:
        """True where an image is given that image encoders see."""
        return self.input_image is not None or self.reference_image is not None

    def size(self, task: Task) -> tuple[int, int, int]:
        """Frames, height and width that are made: those asked for, rounded up, of which the log says so."""
        size = self._rounded_up(task)
        if size != (self.num_frames, self.height, self.width):
            asked = f"{self.num_frames}x{self.height}x{self.width}"
            log.warning("%s frames, height and width are rounded up to %dx%dx%d.", asked, *size)
        return size

    def _rounded_up(self, task: Task) -> tuple[int, int, int]:
        side = 2 * task.latent_pixels
        frames = -(-(max(self.num_frames, 1) - 1) // TEMPORAL_STRIDE) * TEMPORAL_STRIDE + 1
        return frames, -(-self.height // side) * side, -(-self.width // side) * side


def _of_model(found: ClipParameters, task: Task) -> Iterator[Problem]:
    """CFG-405 and CFG-407."""
    if str(found.rand_device) != "cpu":
        what = f"rand_device is {found.rand_device}; noise is drawn on the CPU, where a seed always means the same."
        yield Problem("CFG-405", what, 'Leave it out, or use "cpu".')
    for field in fields(found):
        value, takes = getattr(found, field.name), _TAKEN_BY.get(field.name)
        is_default = value is field.default or (isinstance(value, Real) and value == field.default)
        if takes is not None and not is_default and not takes(task):
            titles = ", ".join(other.title for other in TASKS.values() if takes(other))
            what = f"{field.name} is given, and {task.title} models do not take it."
            yield Problem("CFG-407", what, f"Leave it out, or use a model of {titles}.")


def _together(found: ClipParameters, task: Task) -> Iterator[Problem]:
    """CFG-063, CFG-121, CFG-321 to CFG-323 and CFG-446 for values that do not go together."""
    if found.input_video is None and found.denoising_strength != 1:
        what = "denoising_strength has no effect without input_video."
        yield Problem("CFG-121", what, "Leave it out, or give input_video=.")
    size, stride, threshold = found.sliding_window_size, found.sliding_window_stride, found.tea_cache_l1_thresh
    if (size is None) != (stride is None):
        what = "One of sliding_window_size and sliding_window_stride is given without the other."
        yield Problem("CFG-322", what, "Give both, or neither.")
    elif size is not None and stride is not None:
        words = "sliding_window_size and sliding_window_stride"
        yield from window_problems(size, stride, found._rounded_up(task)[0], words)
    if threshold is not None:
        yield from tea_cache_problems(threshold, found.num_inference_steps, "tea_cache_l1_thresh")
        if found.tea_cache_model_id not in COEFFICIENTS:
            what = f"tea_cache_model_id is {found.tea_cache_model_id!r}, and tea_cache_l1_thresh needs one."
            yield Problem("CFG-446", what, f"Give one of {', '.join(COEFFICIENTS)}.")
    if found.tiled and any(step > side for step, side in zip(found.tile_stride, found.tile_size, strict=True)):
        what = f"tile_stride is {found.tile_stride}, and tile_size {found.tile_size}, which leaves gaps."
        yield Problem("CFG-446", what, "Give strides up to the tile's size.")
    if found.end_image is not None and found.input_image is None:
        what = "end_image is given without input_image, and models are given a last frame beside a first one."
        yield Problem("CFG-446", what, "Give both, or input_image alone.")
    if found.cfg_merge and found.cfg_scale == 1:
        yield Problem(
            "CFG-063", "cfg_merge has no effect with cfg_scale 1.", "Leave it out, or choose another cfg_scale."
        )


def _without_effect(found: ClipParameters, given: Mapping[str, Any]) -> Iterator[str]:
    """Lines for the log: parameters that scripts leave in, and that change nothing beside the others."""
    needed = {
        "camera_control_speed": ("camera_control_direction", found.camera_control_direction is not None),
        "camera_control_origin": ("camera_control_direction", found.camera_control_direction is not None),
        "tile_size": ("tiled=True", found.tiled),
        "tile_stride": ("tiled=True", found.tiled),
        "tea_cache_model_id": ("tea_cache_l1_thresh", found.tea_cache_l1_thresh is not None),
    }
    for name, (other, there) in needed.items():
        if name in given and not there:
            yield f"{name} changes nothing without {other}."
    if given.get("negative_prompt") and found.cfg_scale == 1:
        yield "negative_prompt changes nothing with cfg_scale 1."


def _lists_media(task: Task, listed: str, kind: str | None = None) -> bool:
    return any(media.listed == listed and kind in (None, media.kind) for media in task.media)


_TAKEN_BY: dict[str, Callable[[Task], bool]] = {
    "input_image": lambda task: "images" in every_list_of(task),
    "end_image": lambda task: task.with_last_frame is not None or len(task.frames) > 1,
    "control_video": lambda task: _lists_media(task, "controls"),
    "reference_image": lambda task: _lists_media(task, "references", "image"),
    "camera_control_direction": lambda task: _lists_media(task, "cameras"),
    "vace_video": lambda task: _lists_media(task, "videos"),
    "vace_video_mask": lambda task: _lists_media(task, "masks"),
    "vace_reference_image": lambda task: _lists_media(task, "references", "images"),
    "vace_scale": lambda task: bool(task.made_by(Source.SETTING)),
    "motion_bucket_id": lambda task: bool(task.made_by(Source.COLUMN)),
}
"""Parameters that not every model takes, and the tasks whose models do."""


def _unknown(name: str, known: Sequence[str]) -> Problem:
    near = get_close_matches(name, known, n=1)
    remedy = f"Use {near[0]}." if near else f"Use one of {', '.join(known)}."
    return Problem("CFG-406", f"There is no parameter {name}.", remedy)


def fitted(image: Image.Image, what: str, size: tuple[int, int, int]) -> Tensor:
    """An image resized to a clip's frame, uint8 [height, width, 3]; one of other proportions is warned about."""
    _, height, width = size
    if abs(image.width * height - image.height * width) > max(image.width * height, image.height * width) / 100:
        log.warning("%s is %dx%d and is squeezed into %dx%d.", what, image.height, image.width, height, width)
    resized = image if image.size == (width, height) else image.resize((width, height))
    return torch.from_numpy(np.array(resized.convert("RGB")))


def fitted_video(frames: Frames, what: str, size: tuple[int, int, int]) -> Tensor:
    """Frames resized to a clip's, uint8 [F, height, width, 3]; of other proportions they are warned about once."""
    if len(frames) > size[0]:
        log.warning("%s has %d frames, of which the first %d are taken.", what, len(frames), size[0])
    first, *others = (frames[index] for index in range(min(len(frames), size[0])))
    quiet = [frame.resize((size[2], size[1])) for frame in others]
    return torch.stack([fitted(first, what, size), *(fitted(frame, what, size) for frame in quiet)])
