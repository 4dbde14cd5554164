"""The images and videos that clips are made from, as pixels: resized and cropped as training does with its clips."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm.data.image import image_pixels, read_image
from mm.data.transforms import resize_and_crop
from mm.data.video import probe, read_frames
from mm.errors import DataError


def load_image(path: Path, height: int, width: int) -> Tensor:
    """An image as a frame, float32 [3, height, width] in [-1, 1]; of an animation its first picture.

    Raises:
        DataError: what `mm.data.image.read_image` raises.
    """
    return pixels_frame(read_image(path, may_have_several=True), height, width)


def image_frame(image: Image.Image, name: str, height: int, width: int) -> Tensor:
    """An open image as `load_image` gives its file; `name` is what to call it. Raises DATA-110 as that does."""
    return pixels_frame(image_pixels(image, name), height, width)


def pixels_frame(pixels: Tensor, height: int, width: int) -> Tensor:
    """An image's pixels, uint8 [H, W, 3], as `load_image` gives its file."""
    return resize_and_crop(pixels.permute(2, 0, 1).unsqueeze(0), height, width)[0]


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
