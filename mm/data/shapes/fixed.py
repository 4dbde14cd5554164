"""One size for every sample: covered, and cropped to its centre."""

from __future__ import annotations

from mm.data.shapes.shape import Shape, Size, centred, cover


def fixed_shape(source_height: float, source_width: float, target: Size, frames: int) -> Shape:
    """The shape of a picture as it is shown, whose width need not be whole where pixels are not square."""
    return centred(frames, target, cover(source_height, source_width, target))
