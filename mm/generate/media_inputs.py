"""The images and videos that clips are made from, as pixels: resized and cropped as training does with its clips."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mm.data.files import require_regular_file
from mm.data.transforms import resize_and_crop
from mm.data.video import MAX_SIDE, probe, read_frames
from mm.errors import DataError

log = logging.getLogger(__name__)

_REPLACE = "Replace the file, or correct its path."
_LEAST_OF_LEVELS = 16  # floats that end between 1 and this may be either fractions or levels


def load_image(path: Path, height: int, width: int) -> Tensor:
    """An image as a frame, float32 [3, height, width] in [-1, 1], turned as its camera noted.

    Transparency is left out: a pixel is the colour that is stored, as diffusers and PyAV read it. Grey images of more
    than 8 bits are scaled from black to white, see `_grey_levels`.

    Raises:
        DataError: DATA-001 when it is no readable file, DATA-086 when it is no image or too large, DATA-110 when its
            values have no known range.
    """
    require_regular_file(path, "image")
    try:
        # not by its name: Pillow maps such files, and of TIFF with an orientation gives pixels of other places then
        with path.open("rb") as file, Image.open(file) as image:
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise DataError("DATA-086", f"{path} is PostScript, which is a program and is not run.", _REPLACE)
            if max(image.size) > MAX_SIDE:
                raise DataError("DATA-086", f"{path} has {image.size} pixels, more than {MAX_SIDE} a side.", _REPLACE)
            return image_frame(image, str(path), height, width)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError("DATA-086", f"{path} is no image that can be read ({lines[0]}).", _REPLACE) from None


def image_frame(image: Image.Image, name: str, height: int, width: int) -> Tensor:
    """An open image as `load_image` gives its file; `name` is what to call it. Raises DATA-110 as that does."""
    upright = _rgb(ImageOps.exif_transpose(image), _white(image), name)
    return pixels_frame(torch.from_numpy(upright.copy()), height, width)


def pixels_frame(pixels: Tensor, height: int, width: int) -> Tensor:
    """An image's pixels, uint8 [H, W, 3], as `load_image` gives its file."""
    return resize_and_crop(pixels.permute(2, 0, 1).unsqueeze(0), height, width)[0]


def _rgb(image: Image.Image, white: tuple[int, bool] | None, path: str) -> NDArray[np.uint8]:
    """Pixels [H, W, 3]. Pillow's own conversion cuts everything above 255 off where a grey level has more bits."""
    if not image.mode.startswith(("I", "F")):
        shown = image.convert("RGBA") if image.mode == "P" else image  # else Pillow warns of a palette's transparency
        return np.asarray(shown.convert("RGB"))
    values = np.asarray(image).astype(np.float64)
    most, inverted = white or (_range_of(values, image.mode, path), False)
    levels = np.rint(values * (255 / most)).astype(np.uint8)
    return np.repeat((255 - levels if inverted else levels)[..., None], 3, axis=2)


def _white(image: Image.Image) -> tuple[int, bool] | None:
    """The largest grey level that a file of more than 8 bits can hold, and whether that is black; None if it holds any
    number."""
    tags = getattr(image, "tag_v2", {})  # of TIFF: bits of a sample; 0 for "white is zero"
    if image.mode.startswith("I;16"):
        return 2 ** int(np.max(tags.get(258, 16))) - 1, tags.get(262) == 0
    return (65535, False) if image.mode == "I" and image.format in ("PNG", "PPM") else None  # Pillow scales to that


def _range_of(values: NDArray[np.float64], mode: str, path: str) -> int:
    """White in an image of plain numbers: the least of 1 (of fractions alone), 255 and 65535 that holds all.

    Fractions that end a little above 1 are refused: as levels of 255 they would be black.
    """
    least, most = values.min(), values.max()
    is_either = mode == "F" and 1 < most < _LEAST_OF_LEVELS
    for white in ((1,) if mode == "F" else ()) + (255, 65535):
        if least >= 0 and most <= white and not is_either:  # false for NaN
            log.info("%s holds numbers from %g to %g; %d is taken for white", path, least, most, white)
            return white
    message = f"{path} holds numbers from {least:g} to {most:g}, and what is black and white among them is not known."
    raise DataError("DATA-110", message, "Save it with 8 or 16 bits, or with numbers from 0 to 1.")


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
