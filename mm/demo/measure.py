"""Measures of a generated clip on its pixels: the colour of the shape and the direction it moves in.

A clip is given a colour or a direction only when its pixels leave no doubt; a blank, noisy or static clip is given
none, so that it can never count as obeying its caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mm.demo.clips import COLOURS, DIRECTIONS, TRAVEL, Frames
from mm.demo.clips import SIZE as DRAWN_SIZE
from mm.demo.video import read_video
from mm.errors import DataError

SHAPE_CONTRAST = 60  # least difference of a shape's pixel from the background in its strongest channel, of 255
SHAPE_AREA = (0.02, 0.25)  # of the picture; the drawn shapes cover 0.06 to 0.10
SCATTER = 0.3  # most variance of the shape's pixel positions over its area: 0.16 for a disc, 0.19 for a triangle
COLOUR_DISTANCE = 75.0  # half the distance of the two nearest colours of the palette, so the nearest one is unique
LEAST_TRAVEL = 0.5 * TRAVEL / DRAWN_SIZE  # of the picture: half of what the drawn shapes travel
SIDEWAYS = 0.5  # most motion across the direction, relative to the motion along it
STEADINESS = 0.9  # least squared correlation of position with time


class Measurement(NamedTuple):
    """Colour and direction that a clip shows; None where its pixels do not decide."""

    colour: str | None
    direction: str | None


@dataclass(frozen=True, slots=True)
class MeasuredClip:
    """One clip of a folder, its caption and what it shows."""

    path: Path
    caption: str
    asked: Measurement
    seen: Measurement

    @property
    def colour_hit(self) -> bool:
        """True where the shape has the colour of the caption."""
        return self.seen.colour == self.asked.colour

    @property
    def direction_hit(self) -> bool:
        """True where the shape moves in the direction of the caption."""
        return self.seen.direction == self.asked.direction


def measure_clip(frames: Frames) -> Measurement:
    """Colour and direction of the one shape in a clip.

    The background is the clip's median colour, the shape is what differs from it. Every frame must hold one compact
    shape; else neither colour nor direction is given.

    Args:
        frames: uint8 [F, H, W, 3], RGB.
    """
    pixels = frames.astype(np.float64)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    shape = np.abs(pixels - background).max(axis=-1) > SHAPE_CONTRAST
    if len(frames) < 3 or not all(_is_one_shape(mask) for mask in shape):
        return Measurement(None, None)
    return Measurement(_nearest_colour(pixels[shape].mean(axis=0)), _direction(shape))


def read_caption(caption: str) -> Measurement:
    """The colour and the direction that a caption asks for.

    Raises:
        DataError: DATA-082 when it does not name exactly one of each.
    """
    words = re.findall(r"[a-z]+", caption.lower())
    colours, directions = [w for w in words if w in COLOURS], [w for w in words if w in DIRECTIONS]
    if len(colours) != 1 or len(directions) != 1:
        raise DataError(
            "DATA-082",
            f'The caption "{caption}" must name one of {", ".join(COLOURS)} and one of {", ".join(DIRECTIONS)}.',
            "Score only clips made from captions of the embedded default.",
        )
    return Measurement(colours[0], directions[0])


def score(folder: Path, captions: Sequence[str]) -> tuple[int, int, list[MeasuredClip]]:
    """Count clips that obey their captions: colour hits, direction hits and one row a clip.

    The folder's mp4 files, sorted by name, belong to `captions` in order.

    Raises:
        DataError: DATA-080 when there are not as many clips as captions, DATA-081 for an unreadable clip, DATA-082
            for a caption without colour or direction.
    """
    paths = sorted(path for path in folder.glob("*.mp4") if not path.name.startswith("."))
    if len(paths) != len(captions):
        raise DataError(
            "DATA-080",
            f"{folder} holds {len(paths)} mp4 files for {len(captions)} captions.",
            "Generate one clip for each caption into an empty folder.",
        )
    rows = [
        MeasuredClip(path, caption, read_caption(caption), measure_clip(read_video(path)))
        for path, caption in zip(paths, captions, strict=True)
    ]
    return sum(row.colour_hit for row in rows), sum(row.direction_hit for row in rows), rows


def _is_one_shape(mask: npt.NDArray[np.bool_]) -> bool:
    """Accept a [H, W] mask with neither too few nor too many pixels, which lie together."""
    area = int(mask.sum())
    if not SHAPE_AREA[0] * mask.size <= area <= SHAPE_AREA[1] * mask.size:
        return False
    rows, columns = np.nonzero(mask)
    return bool((rows.var() + columns.var()) / area <= SCATTER)


def _nearest_colour(rgb: npt.NDArray[np.float64]) -> str | None:
    distances = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in COLOURS.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= COLOUR_DISTANCE else None


def _direction(shape: npt.NDArray[np.bool_]) -> str | None:
    """Direction of the centroid's track through [F, H, W] masks, by a straight line fitted over time."""
    centres = np.array([[axis.mean() for axis in np.nonzero(mask)][::-1] for mask in shape])  # [F, 2] as (x, y)
    times = np.arange(len(centres)) - (len(centres) - 1) / 2
    slopes = times @ (centres - centres.mean(axis=0)) / (times @ times)  # pixels a frame, (x, y)
    travel = slopes * (len(centres) - 1) / np.array(shape.shape[:0:-1])  # of the picture's width and height
    along = int(np.abs(travel).argmax())
    track = centres[:, along]
    if abs(travel[along]) < LEAST_TRAVEL or abs(travel[1 - along]) > SIDEWAYS * abs(travel[along]):
        return None
    if np.corrcoef(times, track)[0, 1] ** 2 < STEADINESS:
        return None
    step = tuple(int(np.sign(travel[axis])) if axis == along else 0 for axis in (0, 1))
    return next(name for name, value in DIRECTIONS.items() if value == step)
