"""Images as pixels, upright and in 8 bits a channel, whatever they are stored as.

Transparency is left out: a pixel is the colour that is stored, as of videos, and as diffusers and PyAV read it. Colour
profiles are not applied. Grey images of more than 8 bits are scaled from black to white, see `_range_of`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mm.data.files import require_regular_file
from mm.data.video import MAX_SIDE
from mm.errors import DataError

log = logging.getLogger(__name__)

_REPLACE = "Replace the file, or correct its path."
_LEAST_OF_LEVELS = 16  # floats that end between 1 and this may be either fractions or levels
_LYING = (5, 6, 7, 8)  # EXIF's orientations of pictures that are stored on their side


def read_image(path: Path, *, may_have_several: bool = False) -> Tensor:
    """The pixels of an image file, uint8 [H, W, 3], turned as its camera noted.

    Args:
        path: the file.
        may_have_several: the first picture of an animation or of pages is taken, instead of refusing the file.

    Raises:
        DataError: DATA-001 when it is no readable file, DATA-086 when it is no image, damaged, or too large, DATA-110
            when its values have no known range, DATA-175 when it holds several pictures.
    """
    with _opened(path) as image:
        if not may_have_several:
            _require_one(image, path)
        return image_pixels(image, str(path))


def probe_image(path: Path) -> tuple[int, int]:
    """Height and width of an image, upright; only its header is read. Raises what `read_image` raises."""
    with _opened(path) as image:
        _require_one(image, path)
        width, height = image.size
        # Pillow has turned the size of TIFF already, and no other format's
        lies = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in _LYING
        return (width, height) if lies else (height, width)


def image_pixels(image: Image.Image, name: str) -> Tensor:
    """An open image as `read_image` gives its file; `name` is what to call it. Raises DATA-110 as that does."""
    return torch.from_numpy(_rgb(ImageOps.exif_transpose(image), _white(image), name).copy())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    require_regular_file(path, "image")
    try:
        # not by its name: Pillow maps such files, and of TIFF with an orientation gives pixels of other places then
        with path.open("rb") as file, Image.open(file) as image:
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise DataError("DATA-086", f"{path} is PostScript, which is a program and is not run.", _REPLACE)
            if max(image.size) > MAX_SIDE:
                raise DataError("DATA-086", f"{path} has {image.size} pixels, more than {MAX_SIDE} a side.", _REPLACE)
            yield image
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError("DATA-086", f"{path} is no image that can be read ({lines[0]}).", _REPLACE) from None


def _require_one(image: Image.Image, path: Path) -> None:
    """Refuse animations and pages. Of a camera's MPO file all pictures but the first are views of it."""
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":
        remedy = "Save the picture that is meant as a file of its own; of an animation, as a video."
        raise DataError("DATA-175", f"{path} holds {count} pictures, and a sample is one.", remedy)


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
