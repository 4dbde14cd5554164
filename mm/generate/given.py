"""The images and videos that clips are made from, as pixels: resized and cropped as training does with its clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mm.data.files import require_regular_file
from mm.data.transforms import resize_and_crop
from mm.data.video import MAX_SIDE, probe, read_frames
from mm.errors import DataError

_REPLACE = "Replace the file, or correct its path."


def load_image(path: Path, height: int, width: int) -> Tensor:
    """An image as a frame, float32 [3, height, width] in [-1, 1], turned as its camera noted; without transparency.

    Raises:
        DataError: DATA-001 when it is no readable file, DATA-086 when it is no image or too large.
    """
    require_regular_file(path, "image")
    try:
        with Image.open(path) as image:
            if max(image.size) > MAX_SIDE:
                raise DataError("DATA-086", f"{path} has {image.size} pixels, more than {MAX_SIDE} a side.", _REPLACE)
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError("DATA-086", f"{path} is no image that can be read ({lines[0]}).", _REPLACE) from None
    frame = torch.from_numpy(upright.copy()).permute(2, 0, 1)
    return resize_and_crop(frame.unsqueeze(0), height, width)[0]


def load_video(path: Path, start: int, num_frames: int, height: int, width: int) -> Tensor:
    """Consecutive frames of a video, float32 [3, num_frames, height, width] in [-1, 1].

    Raises:
        DataError: what `mm.data.video` raises, DATA-087 when the video is too short.
    """
    info = probe(path)
    if info.num_frames < start + num_frames:
        raise DataError(
            "DATA-087",
            f"{path} has {info.num_frames} frames, and frames {start} to {start + num_frames - 1} are asked for.",
            "Use a longer video, or lower start_frame or the frames of input_size.",
        )
    chunks = read_frames(path, info, range(start, start + num_frames))
    frames = torch.cat([resize_and_crop(chunk, height, width, info.pixel_aspect) for chunk in chunks])
    return frames.transpose(0, 1).contiguous()
