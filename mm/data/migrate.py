"""Taking over features that MindSpeed-MM extracted: one `.pt` dictionary a sample becomes one safetensors file.

Such a dictionary holds `latents` (later `video`) [16, F, H, W], `prompt` (later `prompt_ids`) [1, 512, D] and
`prompt_mask` [1, 512]. It says nothing about the weights it was made with, so the recipe calls them unknown, and there
is no embedding of the empty caption.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mm.config.data import MAX_TEXT_TOKENS, TEMPORAL_STRIDE, DataSource, Preprocess
from mm.data.features import (
    FEATURES,
    LISTING,
    PRECISIONS,
    Feature,
    FeatureRow,
    Origin,
    feature_name,
    text_hash,
    write_feature,
    write_listing,
)
from mm.data.files import is_text, raise_limited, read_rows, resolve_inside
from mm.data.recipe import UNKNOWN, Recipe, save_recipe
from mm.errors import DataError, Problem

PIXELS_PER_LATENT = 8
_REMEDY = "Leave the sample out of data.jsonl, or extract it again from its video."


def migrate(source: DataSource, target: Path, made_with: Preprocess, *, show_progress: bool = True) -> int:
    """Convert a folder of MindSpeed-MM features to a feature store.

    Args:
        source: the folder (save_path) and its data.jsonl.
        target: the store to write; it must not hold a finished one.
        made_with: size, length and interval that the features were extracted with, as training will ask for them.
        show_progress: a progress bar on standard error.

    Returns:
        The number of samples.

    Raises:
        DataError: DATA-060 or DATA-061 for the list, DATA-063 for unsafe paths, DATA-065 for a file that is unreadable
            or would run code, DATA-066 for one that is no text-to-video feature, DATA-067 when its size is not
            `made_with`, DATA-068 when the target holds a finished store, DATA-018 and DATA-019 when writing fails.
    """
    if (target / LISTING).exists():
        raise DataError("DATA-068", f"{target} holds a finished feature store.", "Name another folder.")
    entries = _entries(source)
    (target / FEATURES).mkdir(parents=True, exist_ok=True)
    rows: list[FeatureRow] = []
    recipe: Recipe | None = None
    for sample, caption, file in tqdm(entries, desc="migrate", unit="sample", disable=not show_progress):
        feature = _read(file, made_with)
        assert feature.latents is not None  # noqa: S101  _read gives both
        if recipe is None:
            recipe = _recipe(feature, made_with)
            save_recipe(target, recipe)
        name = feature_name(sample)
        origin = Origin(sample, recipe.key, text_hash(caption), UNKNOWN)
        write_feature(target / FEATURES / name, feature, origin, MAX_TEXT_TOKENS)
        rows.append(_row(sample, caption, name, feature.latents, len(feature.prompt)))
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
        if sample in entries:
            problems.append(Problem("DATA-064", f"{place}: {sample} is listed before.", "Keep one row."))
        try:
            entries[sample] = (sample, caption, resolve_inside(source.folder, file, place))
        except DataError as error:
            problems += error.problems
    raise_limited(problems)
    return list(entries.values())


def _read(file: Path, made_with: Preprocess) -> Feature:
    try:
        values: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises for a refused or damaged file has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{file} cannot be read as plain tensors ({reason})."
        raise DataError("DATA-065", message, "Extract the sample again from its video.") from None
    latents, prompt, mask = _tensors(values, file)
    length = int(mask.sum())
    if length < 1 or not bool((mask.bool() == (torch.arange(len(mask)) < length)).all()):
        message = f"{file}: prompt_mask does not mark the first tokens of the prompt."
        raise DataError("DATA-066", message, _REMEDY)
    frames, height, width = _video_size(latents)
    if (height, width) != (made_with.max_height, made_with.max_width) or frames > made_with.num_frames:
        expected = f"{made_with.num_frames}x{made_with.max_height}x{made_with.max_width}"
        message = f"{file} is {frames}x{height}x{width}, expected at most {expected}."
        raise DataError("DATA-067", message, "Correct preprocess_parameters, or leave the sample out of data.jsonl.")
    return Feature(latents, prompt[:length].contiguous())


def _tensors(values: Any, file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [16, F, H, W], prompt [L, D] and mask [L] of a dictionary, its names and shapes checked."""
    known = {"latents": "latents", "video": "latents", "prompt": "prompt", "prompt_ids": "prompt"}
    names = {known.get(name, name): value for name, value in values.items()} if isinstance(values, dict) else {}
    if set(names) != {"latents", "prompt", "prompt_mask"} or not all(isinstance(v, Tensor) for v in names.values()):
        held = ", ".join(sorted(map(str, values))) if isinstance(values, dict) else type(values).__name__
        message = f"{file} holds {held}; expected the tensors latents, prompt and prompt_mask."
        raise DataError("DATA-066", message, _REMEDY)
    latents, prompt, mask = names["latents"], names["prompt"], names["prompt_mask"]
    prompt = prompt[0] if prompt.ndim == 3 and len(prompt) == 1 else prompt
    mask = mask[0] if mask.ndim == 2 and len(mask) == 1 else mask
    floating = {latents.dtype, prompt.dtype} <= set(PRECISIONS.values())
    if latents.ndim != 4 or prompt.ndim != 2 or mask.shape != prompt.shape[:1] or not floating:
        shapes = ", ".join(f"{name} {value.dtype} {list(value.shape)}" for name, value in names.items())
        message = f"{file} holds {shapes}; expected latents [16, F, H, W], prompt [1, L, D] and prompt_mask [1, L]."
        raise DataError("DATA-066", message, _REMEDY)
    return latents, prompt, mask


def _video_size(latents: Tensor) -> tuple[int, int, int]:
    frames, height, width = latents.shape[1:]
    return (frames - 1) * TEMPORAL_STRIDE + 1, height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT


def _recipe(feature: Feature, made_with: Preprocess) -> Recipe:
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    latents_dtype = feature.latents.dtype if feature.latents is not None else None
    return Recipe(
        vae=UNKNOWN,
        text_encoder=UNKNOWN,
        tokenizer=UNKNOWN,
        height=made_with.max_height,
        width=made_with.max_width,
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
    )


def _row(sample: str, caption: str, name: str, latents: Tensor, text_tokens: int) -> FeatureRow:
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
    )
