"""Arguments of callers as the types that the rooms below take, and their mistakes, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mm.config.tasks.task import Task
from mm.errors import ConfigError, DataError, Problem
from mm.generate.media_inputs import image_frame, load_image, load_video, pixels_frame

Pixels: TypeAlias = NDArray[np.uint8] | Tensor
ImageInput: TypeAlias = str | Path | Image.Image | Pixels
"""An image: a file, one of Pillow's, or uint8 [H, W, 3]."""
VideoInput: TypeAlias = str | Path | Pixels
"""A video: a file, or uint8 [F, H, W, 3]."""


def as_pixels(value: Pixels, what: str, ndim: int) -> Tensor:
    """Pixels as a tensor.

    Raises:
        ConfigError: CFG-200 for another type or shape than uint8 [(F,) H, W, 3].
    """
    tensor = torch.from_numpy(np.require(value, requirements=["C", "W"])) if isinstance(value, np.ndarray) else value
    if tensor.dtype != torch.uint8 or tensor.ndim != ndim or tensor.shape[-1] != 3 or not tensor.numel():
        expected = "[F, H, W, 3]" if ndim == 4 else "[H, W, 3]"
        found = f"{what} is {tensor.dtype} of shape {list(tensor.shape)}"
        raise ConfigError("CFG-200", f"{found}, expected uint8 {expected}.", "Convert it, or give the path of a file.")
    return tensor.cpu()


def image_of(value: ImageInput, what: str, height: int, width: int) -> Tensor:
    """An image as a frame, float32 [3, height, width] in [-1, 1]; raises as `load_image` and `as_pixels`."""
    if isinstance(value, (str, Path)):
        return load_image(Path(value), height, width)
    if isinstance(value, Image.Image):
        return image_frame(value, what, height, width)
    return pixels_frame(as_pixels(value, what, 3), height, width)


def video_of(value: VideoInput, what: str, size: tuple[int, int, int]) -> Tensor:
    """The first frames of a video, float32 [3, F, height, width] in [-1, 1].

    Raises:
        DataError: DATA-087 when it is too short, and what `load_video` raises.
    """
    if isinstance(value, (str, Path)):
        return load_video(Path(value), 0, *size)
    frames = as_pixels(value, what, 4)
    if len(frames) < size[0]:
        message = f"{what} has {len(frames)} frames, and {size[0]} are asked for."
        raise DataError("DATA-087", message, "Give a longer one, or ask for fewer frames in size.")
    return torch.stack([pixels_frame(frame, size[1], size[2]) for frame in frames[: size[0]]], dim=1)


def column_problems(task: Task, columns: Mapping[str, object], where: str) -> Iterator[Problem]:
    """CFG-120 for numbers that a task takes and lacks, takes no such, or that are outside of what it takes."""
    for column in task.columns:
        value = columns.get(column.name)
        if not column.holds(value):
            found = "lacks" if value is None else f"has {value!r} for"
            yield Problem("CFG-120", f"{where} {found} {column.name}.", f"Give {column.expected}.")
    for name in sorted(columns.keys() - {column.name for column in task.columns}):
        yield Problem("CFG-120", f"{where} has {name}, which {task.title} models do not take.", "Leave it out.")
