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
from mm.data.image import image_pixels
from mm.errors import ConfigError, DataError, Problem
from mm.generate.media_inputs import (
    as_mask,
    image_frame,
    load_image,
    load_mask,
    load_picture,
    load_video,
    picture,
    pixels_frame,
)
from mm.generate.sources import camera_rows
from mm.poses import rows_of_frames

Pixels: TypeAlias = NDArray[np.uint8] | Tensor
ImageInput: TypeAlias = str | Path | Image.Image | Pixels
"""An image: a file, one of Pillow's, or uint8 [H, W, 3]."""
VideoInput: TypeAlias = str | Path | Pixels
"""A video: a file, or uint8 [F, H, W, 3]."""
MaskInput: TypeAlias = str | Path | Pixels
"""A mask: a file of a video or an image, or uint8 [F, H, W] or [H, W]; 255 where the video is made anew."""
CameraInput: TypeAlias = str | Path | Tensor
"""A camera's path: a pose file, a direction and perhaps a speed (`Left 0.02`), or rows [poses, 19]."""


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


def picture_of(value: ImageInput, what: str) -> Tensor:
    """An image of its own size, float32 [3, H, W] in [-1, 1]; raises as `load_image` and `as_pixels`."""
    if isinstance(value, (str, Path)):
        return load_picture(Path(value))
    return picture(image_pixels(value, what) if isinstance(value, Image.Image) else as_pixels(value, what, 3))


def mask_of(value: MaskInput, what: str, video: VideoInput | None, size: tuple[int, int, int]) -> Tensor:
    """A mask, float32 [F, height, width] from 0 to 1; `video` is what it is a mask of.

    Raises:
        ConfigError: CFG-200 for another type or shape, CFG-252 for another size than the video's, CFG-281 for colours.
        DataError: what `load_mask` raises, DATA-087 when it is too short.
    """
    if isinstance(value, (str, Path)):
        return load_mask(Path(value), Path(video) if isinstance(video, (str, Path)) else None, 0, size)
    grey = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if grey.dtype != torch.uint8 or grey.ndim not in (2, 3):
        found = f"{what} is {grey.dtype} of shape {list(grey.shape)}, expected uint8 [F, H, W] or [H, W]."
        raise ConfigError("CFG-200", found, "Convert it, or give the path of a file.")
    if video is not None and not isinstance(video, (str, Path)) and grey.shape[-2:] != video.shape[1:3]:
        (tall, wide), (rows, columns) = grey.shape[-2:], video.shape[1:3]
        found = f"{what} is {tall}x{wide} pixels, its video {rows}x{columns}."
        raise ConfigError("CFG-252", found, "Give a mask of the video's size.")
    frames = grey if grey.ndim == 3 else grey.expand(size[0], *grey.shape)
    return as_mask(video_of(frames.unsqueeze(-1).repeat(1, 1, 1, 3), what, size), what)


def camera_of(value: CameraInput, num_frames: int) -> Tensor:
    """Rows of a camera's path, [num_frames, 19], as `camera_rows` gives those of a line."""
    if isinstance(value, Tensor):
        return rows_of_frames(value, num_frames, range(num_frames))
    return camera_rows(str(value), num_frames)


def column_problems(task: Task, columns: Mapping[str, object], where: str) -> Iterator[Problem]:
    """CFG-120 for numbers that a task takes and lacks, takes no such, or that are outside of what it takes."""
    for column in task.columns:
        value = columns.get(column.name)
        if not column.holds(value):
            found = "lacks" if value is None else f"has {value!r} for"
            yield Problem("CFG-120", f"{where} {found} {column.name}.", f"Give {column.expected}.")
    for name in sorted(columns.keys() - {column.name for column in task.columns}):
        yield Problem("CFG-120", f"{where} has {name}, which {task.title} models do not take.", "Leave it out.")
