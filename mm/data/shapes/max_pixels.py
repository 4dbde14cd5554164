"""DiffSynth's dynamic resolution. Source: `ImageCropAndResize` of `diffsynth/core/data/operators.py`."""

from __future__ import annotations

from math import sqrt

from mm.config.run.shapes import MaxPixels
from mm.data.shapes.shape import Shape, Size, centred, cover
from mm.errors import DataError


def max_pixels_shape(rule: MaxPixels, source: Size, num_frames: int) -> Shape:
    """The shape of the picture's own size, made smaller where it has too many pixels.

    Raises:
        DataError: DATA-161 when a side has less than a multiple.
    """
    height, width = source
    if height * width > rule.max_pixels:
        scale = sqrt(height * width / rule.max_pixels)
        height, width = int(height / scale), int(width / scale)
    target = height // rule.multiple * rule.multiple, width // rule.multiple * rule.multiple
    if 0 in target:
        message = f"A picture of {source[0]} x {source[1]} has no {rule.multiple} pixels left on a side."
        raise DataError("DATA-161", message, "Remove the sample, or give it another size; max_pixels may be too small.")
    return centred(num_frames, target, cover(*source, target))
