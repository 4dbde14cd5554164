"""Taking over features that MindSpeed-MM extracted: one `.pt` dictionary a sample becomes one safetensors file.

Such a dictionary holds `latents` (later `video`) [16, F, H, W], `prompt` (later `prompt_ids`) [1, 512, D] and
`prompt_mask` [1, 512]; with images also tokens of the image encoder [257 an image, 1280] and the condition
[4 + 16, F, H, W], under the names that `mm.config.tasks` declares. It says nothing about the weights it was made with,
so the recipe calls them unknown, and there is no embedding of the empty caption.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm.config.data import MAX_TEXT_TOKENS, TEMPORAL_STRIDE, DataSource
from mm.config.run.data import Clip
from mm.config.tasks.frames import MASK_CHANNELS
from mm.config.tasks.registry import DEFAULT, TASKS
from mm.config.tasks.task import Frame, InputFeature, Sizes, Source, Task
from mm.data.features import FEATURES, LISTING, PRECISIONS, Feature, Origin, feature_name, text_hash, write_feature
from mm.data.files import is_text, make_folder, path_below, raise_limited, read_rows
from mm.data.listing import FeatureRow, write_listing
from mm.data.recipe import UNKNOWN, Recipe, save_recipe
from mm.data.store.catalog import holds_shards
from mm.errors import DataError, Problem

PIXELS_PER_LATENT = 8
_NAMES = {
    "latents": "latents",
    "video": "latents",
    "prompt": "prompt",
    "prompt_ids": "prompt",
    "prompt_mask": "prompt_mask",
}
_OF_EVERY_TASK = frozenset(_NAMES.values())
_FEATURES: dict[str, InputFeature] = {
    feature.mindspeed: feature for task in TASKS.values() for feature in task.features if feature.mindspeed is not None
}
"""By MindSpeed-MM's name."""
_REMEDY = "Leave the sample out of data.jsonl, or extract it again from its video."


def migrate(source: DataSource, target: Path, made_with: Clip, *, show_progress: bool = True) -> int:
    """Convert a folder of MindSpeed-MM features to a feature store.

    Args:
        source: the folder (save_path) and its data.jsonl.
        target: the store to write; it must not hold a finished one.
        made_with: size, length and interval that the features were extracted with, as training will ask for them.
        show_progress: a progress bar on standard error.

    Returns:
        The number of samples.

    Raises:
        DataError: DATA-049 when the files are of different tasks, DATA-060 or DATA-061 for the list, DATA-063 for
            unsafe paths, DATA-065 for a file that is unreadable or would run code, DATA-066 for one that is no feature
            of Wan2.1, DATA-067 when its size is not `made_with`, DATA-068 when the target holds a finished store or
            shards, DATA-018 and DATA-019 when writing fails.
    """
    if (target / LISTING).exists() or holds_shards(target):
        raise DataError("DATA-068", f"{target} holds a finished feature store.", "Name another folder.")
    entries = _entries(source)
    make_folder(target / FEATURES, "--target")
    rows: list[FeatureRow] = []
    recipe: Recipe | None = None
    for sample, caption, file in tqdm(entries, desc="migrate", unit="sample", disable=not show_progress or None):
        feature = _read(file, made_with)
        assert feature.latents is not None  # noqa: S101  _read gives both
        task = _task(feature, file)
        if recipe is None:
            recipe = _recipe(feature, made_with, task)
            save_recipe(target, recipe)
        elif task != recipe.task:
            message = f"{file} is of the task {task}, the files before it are of {recipe.task}."
            raise DataError("DATA-049", message, "Give each task a folder with a data.jsonl of its own.")
        name = feature_name(sample)
        origin = Origin(sample, recipe.key, text_hash(caption), UNKNOWN)
        write_feature(target / FEATURES / name, feature, origin, MAX_TEXT_TOKENS)
        rows.append(_row(sample, caption, name, feature.latents, len(feature.prompt), task))
    write_listing(target, rows)
    return len(rows)


def _entries(source: DataSource) -> list[tuple[str, str, Path]]:
    """(sample id, caption, file) of every row; the file is `file` in later versions, `path` in earlier ones."""
    entries: dict[str, tuple[str, str, Path]] = {}
    problems: list[Problem] = []
    for number, row in enumerate(read_rows(source.annotation, "DATA-060"), start=1):
        place = f"{source.annotation} row {number}"
        row = row if isinstance(row, dict) else {}
        caption = row.get("cap")
        caption = caption[0] if isinstance(caption, list) and len(caption) == 1 else caption
        texts = [v for v in (row.get("path"), row.get("file", row.get("path")), caption) if isinstance(v, str)]
        if len(texts) != 3 or not all(map(is_text, texts)):
            problems.append(Problem("DATA-061", f"{place} lacks a path, a caption (cap) or both.", _REMEDY))
            continue
        sample, file, caption = os.path.normpath(texts[0]), texts[1], texts[2]
        try:
            place_of_file = path_below(source.folder, file, place)
            if sample in entries and entries[sample][2] != place_of_file:  # another cut of one video
                sample = f"{sample}//{os.path.normpath(file)}"
            if sample in entries:
                problems.append(Problem("DATA-064", f"{place}: {file} is listed before.", "Keep one row."))
            entries[sample] = (sample, caption, place_of_file)
        except DataError as error:
            problems += error.problems
    raise_limited(problems)
    return list(entries.values())


def _read(file: Path, made_with: Clip) -> Feature:
    try:
        values: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a refused or damaged file has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{file} cannot be read as plain tensors ({reason})."
        raise DataError("DATA-065", message, "Extract the sample again from its video.") from None
    tensors = _tensors(values, file)
    latents, prompt, mask = tensors["latents"], tensors["prompt"], tensors["prompt_mask"]
    length = int(mask.sum())
    if length < 1 or not bool((mask.bool() == (torch.arange(len(mask)) < length)).all()):
        message = f"{file}: prompt_mask does not mark the first tokens of the prompt."
        raise DataError("DATA-066", message, _REMEDY)
    frames, height, width = _video_size(latents)
    if (height, width) != (made_with.height, made_with.width) or frames > made_with.num_frames:
        expected = f"{made_with.num_frames}x{made_with.height}x{made_with.width}"
        message = f"{file} is {frames}x{height}x{width}, expected at most {expected}."
        raise DataError("DATA-067", message, "Correct preprocess_parameters, or leave the sample out of data.jsonl.")
    features = {name: value for name, value in tensors.items() if name not in _OF_EVERY_TASK}
    return Feature(latents, prompt[:length].contiguous(), 0, features)


def _tensors(values: Any, file: Path) -> dict[str, Tensor]:
    """Latents [16, F, H, W], prompt [L, D], mask [L] and the features of one task of a dictionary, its names and shapes
    checked."""
    given: dict[str, Any] = values if isinstance(values, dict) else {}
    ours = _NAMES | {name: feature.name for name, feature in _FEATURES.items()}
    names = {ours.get(name, name): value for name, value in given.items()}
    known = any(set(names) == _OF_EVERY_TASK | {feature.name for feature in task.features} for task in _migrated())
    if not known or not all(isinstance(value, Tensor) for value in names.values()):
        held = ", ".join(sorted(map(str, values))) if isinstance(values, dict) else type(values).__name__
        message = f"{file} holds {held}; expected the tensors latents, prompt and prompt_mask"
        message += f", and with images {' and '.join(_FEATURES)}."
        raise DataError("DATA-066", message, _REMEDY)
    # features that were saved as a batch of one sample, or of images, lose that axis
    axes = {"latents": 4, "prompt": 2, "prompt_mask": 1} | _axes()
    found = {
        name: value[0] if value.ndim == axes[name] + 1 and len(value) == 1 and name != "latents" else value
        for name, value in names.items()
    }
    latents, prompt, mask = found["latents"], found["prompt"], found["prompt_mask"]
    right = all(value.ndim == axes[name] for name, value in found.items()) and mask.shape == prompt.shape[:1]
    right &= {value.dtype for name, value in found.items() if name != "prompt_mask"} <= set(PRECISIONS.values())
    if right:
        channels, frames, height, width = latents.shape
        sizes = Sizes(channels, (frames, height, width), 0, 0)
        for feature in _FEATURES.values():
            if feature.source is Source.KNOWN_FRAMES and feature.name in found:
                right &= found[feature.name].shape == feature.shape(sizes)
    if not right:
        shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in names.items())
        message = f"{file} holds {shapes}; expected latents [16, F, H, W], prompt [1, L, D], prompt_mask [1, L]"
        message += ", and with images image_features [257 or 514, 1280] and condition [20, F, H, W]."
        raise DataError("DATA-066", message, _REMEDY)
    return found


def _migrated() -> list[Task]:
    """The tasks whose features MindSpeed-MM has."""
    return [task for task in TASKS.values() if all(feature.mindspeed for feature in task.features)]


def _axes() -> dict[str, int]:
    """Number of axes of each feature."""
    sizes = Sizes(1, (1, 1, 1), 1, 1)
    return {feature.name: len(feature.shape(sizes)) for feature in _FEATURES.values()}


def _task(feature: Feature, file: Path) -> str:
    """Task of a feature, by the frames that its mask calls known."""
    found = [name for name, spec in _FEATURES.items() if spec.name in feature.features]
    masked = [name for name in found if _FEATURES[name].source is Source.KNOWN_FRAMES]
    if not masked:
        return DEFAULT.name
    mask = feature.features[_FEATURES[masked[0]].name][:MASK_CHANNELS]
    tasks = [task for task in _migrated() if task.frames]
    for task in tasks:
        if mask.shape[1] > 1 and torch.equal(mask, _known(task.frames, mask)):
            return task.name
    what = " nor ".join(" and ".join(f"the {frame.name} frame" for frame in task.frames) for task in tasks)
    raise DataError("DATA-066", f"{file}: the mask of {masked[0]} marks neither {what}.", _REMEDY)


def _known(frames: Sequence[Frame], like: Tensor) -> Tensor:
    """The mask [4, F, H, W] of given frames; latent frame 0 is the first frame, others are four, one a channel."""
    mask = torch.zeros_like(like)
    for frame in frames:
        if frame.index == 0:
            mask[:, 0] = 1
        else:
            mask[frame.index % MASK_CHANNELS, frame.index] = 1
    return mask


def _video_size(latents: Tensor) -> tuple[int, int, int]:
    frames, height, width = latents.shape[1:]
    return (frames - 1) * TEMPORAL_STRIDE + 1, height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT


def _recipe(feature: Feature, made_with: Clip, task: str) -> Recipe:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    latents_dtype = feature.latents.dtype if feature.latents is not None else None
    return Recipe(
        task=task,
        vae=UNKNOWN,
        text_encoder=UNKNOWN,
        tokenizer=UNKNOWN,
        height=made_with.height,
        width=made_with.width,
        num_frames=made_with.num_frames,
        min_num_frames=1,
        frame_interval=made_with.frame_interval,
        crop=UNKNOWN,
        vae_dtype=names.get(latents_dtype, UNKNOWN) if latents_dtype else UNKNOWN,
        text_dtype=names.get(feature.prompt.dtype, UNKNOWN),
        tile_size=None,
        tile_stride=None,
        text_cleaning=UNKNOWN,
        max_text_tokens=MAX_TEXT_TOKENS,
        seed=0,
        image_encoder=UNKNOWN if TASKS[task].made_by(Source.IMAGE_ENCODER) else None,
    )


def _row(sample: str, caption: str, name: str, latents: Tensor, text_tokens: int, task: str) -> FeatureRow:
    frames, height, width = _video_size(latents)
    channels, latent_frames, latent_height, latent_width = latents.shape
    return FeatureRow(
        sample=sample,
        file=f"{FEATURES}/{name}",
        path=sample,
        cap=caption,
        start_frame_idx=0,
        sample_num_frames=frames,
        sample_size=f"{frames}x{height}x{width}",
        latent_shape=(channels, latent_frames, latent_height, latent_width),
        text_tokens=text_tokens,
        task=task,
    )
