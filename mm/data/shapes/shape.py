"""A shape, and the geometry that all rules share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm.errors import DataError

Size = tuple[int, int]
"""Height and width, in pixels."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape that a sample is brought to.

    Attributes:
        frames: the most that its clip has, 4k + 1.
        height, width: pixels of the clip.
        cover: size that its picture is resized to first.
        corner: top and left of the clip in it.
    """

    frames: int
    height: int
    width: int
    cover: Size
    corner: Size


def cover(source_height: float, source_width: float, target: Size) -> Size:
    """Smallest size of the source's aspect that covers the target, each side rounded to the nearest pixel."""
    height, width = target
    scale = max(height / source_height, width / source_width)
    # max: rounding must never leave a side one pixel short of what the crop takes
    return max(height, round(source_height * scale)), max(width, round(source_width * scale))


def centre(covering: Size, target: Size) -> Size:
    """Top and left of the target in the middle, the odd pixel at the end."""
    return (covering[0] - target[0]) // 2, (covering[1] - target[1]) // 2


def centred(frames: int, target: Size, covering: Size) -> Shape:
    """The shape that is cropped from the middle."""
    return Shape(frames, *target, covering, centre(covering, target))


def draw(chance: torch.Generator, weights: Sequence[float]) -> int:
    """Index drawn by weights."""
    total = 0.0
    place = float(torch.rand((), generator=chance, dtype=torch.float64)) * sum(weights)
    for index, weight in enumerate(weights):
        total += weight
        if place < total:
            return index
    return len(weights) - 1


def left_out(why: str, remedy: str) -> DataError:
    """DATA-160: a rule leaves a sample out."""
    return DataError("DATA-160", why, remedy)
