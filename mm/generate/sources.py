"""Sources of a clip's features that the model's task declares, one function for each.

Encoders that nothing else needs run before the transformer is there and leave the device to it; what the VAE makes, and
what is as large as the clip, waits for it.

Shapes: B clips, C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mm.config.model import WanConfig
from mm.config.tasks.task import Frame, InputFeature, Source, Task
from mm.errors import ConfigError
from mm.generate.camera_line import is_move, read_move
from mm.poses import SPEED, direction_rows, read_poses, rows_of_frames
from mm.wan.conditions.camera import View, camera_channels
from mm.wan.conditions.control import control_condition, reference_latents, start_condition
from mm.wan.conditions.inpaint import inpaint_condition
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.vace import vace_context
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Given:
    """Inputs of a clip beside its prompt, as values; pixels are of the clip's size, in [-1, 1].

    Attributes:
        images: the given frames, [3, height, width] each. columns: the task's numbers, by name.
        begins_as: [3, frames, height, width], what the clip is made from, with noise.
        video: the same of what is edited.
        mask: [frames, height, width] from 0 to 1, 1 where the video is made anew.
        control: [3, frames, height, width], what the clip follows.
        references: [3, height, width] each, of any size where there may be several.
        camera: [frames, 19], rows of the path (`mm.poses`). settings: features that are set, by name.
        text_only: a model that sees frames is shown none.
    """

    images: tuple[Tensor, ...] = ()
    columns: Mapping[str, float] = field(default_factory=dict)
    begins_as: Tensor | None = None
    video: Tensor | None = None
    mask: Tensor | None = None
    control: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    camera: Tensor | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    text_only: bool = False


def frames_in_front(task: Task, given: Given) -> int:
    """Latent frames in front of the clip's, which are dropped before decoding."""
    return len(given.references) if any(media.in_front for media in task.media) else 0


def camera_rows(line: str, num_frames: int) -> Tensor:
    """Rows of a camera's path, [num_frames, 19]: a pose file's stretched over the clip, or a direction's.

    Args:
        line: the file, or a direction and perhaps a speed. num_frames: of the clip.

    Raises:
        DataError, ConfigError: what `mm.poses` raises.
    """
    if not is_move(line):
        return rows_of_frames(read_poses(Path(line)), num_frames, range(num_frames))
    direction, speed = read_move(line)
    try:
        number = SPEED if speed is None else float(speed)
    except ValueError:
        found = f"The camera's speed is {speed!r}."
        raise ConfigError("CFG-257", found, f"Give a number; {SPEED:.3g} is usual.") from None
    return direction_rows(direction, num_frames, number)


def kind_of_clip(task: Task, given: Given) -> tuple[int, bool]:
    """Facts that clips of a batch must have in common: latent frames in front of theirs, and whether their own first
    one is given clean.
    """
    return frames_in_front(task, given), bool(task.first_frame_share) and bool(given.images)


@dataclass(frozen=True)
class EarlyFeatures:
    """Makes the features that need no VAE.

    Attributes:
        wan: the transformer's shape. image_encoder: where one is asked.
    """

    wan: WanConfig
    image_encoder: ImageEncoder | None

    def of(self, given: Given) -> dict[str, Tensor]:
        """Those of one clip, [*shape] by name, on the CPU."""
        return {
            feature.name: _EARLY[feature.source](self, feature, given)
            for feature in self.wan.task.features
            if feature.source in _EARLY and (feature.source is not Source.SETTING or feature.name in given.settings)
        }


@dataclass(frozen=True)
class LateFeatures:
    """Makes the features that the VAE makes, or that are as large as the clip.

    Attributes:
        wan: the transformer's shape. video: the VAE. size: of the clips.
        frames: which frames of the clips the images are.
    """

    wan: WanConfig
    video: VideoEncoder
    size: ClipSize
    frames: tuple[Frame, ...]

    def of(self, given: Sequence[Given]) -> dict[str, Tensor]:
        """Those of some clips, [B, *shape] by name, on any device.

        Raises:
            ConfigError: what `mm.wan.conditions` raises.
            DataError: DATA-044 for a VAE that is not Wan's.
        """
        return {
            feature.name: _LATE[feature.source](self, given)
            for feature in self.wan.task.features
            if feature.source in _LATE
        }


def _image_features(early: EarlyFeatures, feature: InputFeature, given: Given) -> Tensor:
    """[I, img_dim], one image at a time; zeros where there is none."""
    seen = _seen(early.wan.task, given)
    if not seen:
        return torch.zeros(early.wan.feature_shapes((1, 1, 1))[feature.name])
    encoder = early.image_encoder
    assert encoder is not None  # noqa: S101  whoever reads a configuration refuses images without it
    return torch.cat([encoder.encode(image.unsqueeze(0))[0] for image in seen]).cpu()


def _seen(task: Task, given: Given) -> tuple[Tensor, ...]:
    """Images that the image encoder sees.

    A model that was made for one image sees the first one alone; the last one reaches it through its latents. Of a
    masked video it is the first frame, where all of that is known. A reference goes before a start image.
    """
    if given.mask is not None and given.video is not None:
        return (given.video[:, 0],) if bool((given.mask[0] <= 0.5).all()) else ()
    return given.images[: len(task.frames)] if task.frames else (*given.references, *given.images)[:1]


def _column(early: EarlyFeatures, feature: InputFeature, given: Given) -> Tensor:
    """The number, fp32, without axes."""
    del early
    return torch.tensor(given.columns[feature.name])


def _setting(early: EarlyFeatures, feature: InputFeature, given: Given) -> Tensor:
    """The number, fp32, without axes."""
    del early
    return torch.tensor(given.settings[feature.name])


def _known(late: LateFeatures, given: Sequence[Given]) -> Tensor:
    """Mask and latents of what each clip is given, [B, 4 + C, F, H, W]: frames, a masked video or nothing."""
    if given[0].mask is None and not given[0].text_only:
        images = enumerate(late.frames)
        by_index = {frame.index: torch.stack([of.images[which] for of in given]) for which, frame in images}
        return condition_latents(late.video.encode, by_index, late.size.frames)
    encode, channels = late.video.encode, late.wan.out_dim
    return torch.stack([inpaint_condition(encode, late.size, of.video, of.mask, channels=channels) for of in given])


def _control(late: LateFeatures, given: Sequence[Given]) -> Tensor:
    """Latents of each control video and start image, [B, 2 C, F, H, W]."""
    return torch.stack([control_condition(late.video.encode, late.size, of.control, _start(of)) for of in given])


def _start_image(late: LateFeatures, given: Sequence[Given]) -> Tensor:
    """Latents of each start image, [B, C, F, H, W]."""
    return torch.stack([start_condition(late.video.encode, late.size, _start(of), late.wan.out_dim) for of in given])


def _start(given: Given) -> Tensor | None:
    return given.images[0] if given.images else None


def _reference(late: LateFeatures, given: Sequence[Given]) -> Tensor:
    """Latents of each reference, [B, C, H, W]; zeros without one."""
    encode, channels = late.video.encode, late.wan.out_dim
    found = [
        reference_latents(encode, late.size, of.references[0] if of.references else None, channels) for of in given
    ]
    device = late.video.vae.device
    return torch.stack([latents.to(device) for latents in found])


def _rays(late: LateFeatures, given: Sequence[Given]) -> Tensor:
    """Rays of each camera, [B, 24, F, height, width]."""
    view = View(late.size.height, late.size.width)
    return torch.stack([camera_channels(of.camera, view) for of in given if of.camera is not None])


def _edited(late: LateFeatures, given: Sequence[Given]) -> Tensor:
    """Contexts of the side blocks, [B, 2 C + 64, R + F, H, W]; all clips have R references."""
    encode = late.video.encode
    return torch.stack([vace_context(encode, late.size, of.video, of.mask, of.references) for of in given])


_EARLY: dict[Source, Callable[[EarlyFeatures, InputFeature, Given], Tensor]] = {
    Source.IMAGE_ENCODER: _image_features,
    Source.COLUMN: _column,
    Source.SETTING: _setting,
}
EARLY_SOURCES = frozenset(_EARLY)
_LATE: dict[Source, Callable[[LateFeatures, Sequence[Given]], Tensor]] = {
    Source.KNOWN_FRAMES: _known,
    Source.CONTROL_VIDEO: _control,
    Source.START_IMAGE: _start_image,
    Source.REFERENCE_IMAGE: _reference,
    Source.CAMERA_PATH: _rays,
    Source.EDITED_VIDEO: _edited,
}
