"""Turn of a stored picture to be shown: the display matrix of ISO/IEC 14496-12, 8.3.2."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import av.sidedata.sidedata
import numpy as np
import numpy.typing as npt

from mm.errors import DataError

Pixels = npt.NDArray[np.uint8]

_SLANT = 1e-3  # of a side; less is rounding
_MAX_KINDS = 64  # of side data; FFmpeg 8 has half as many


@dataclass(frozen=True, slots=True)
class Orientation:
    """One of the eight ways to lay a picture on its sides: rows and columns are exchanged first, then mirrored."""

    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: Pixels) -> Pixels:
        """Stored pixels [H, W, C] as they are shown."""
        turned = pixels.transpose(1, 0, 2) if self.transposed else pixels
        return turned[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def frame_orientation(frame: Any, file: Path) -> Orientation:
    """The orientation of a decoded PyAV frame.

    Raises:
        DataError: DATA-096 when its matrix does more than turn it by quarters and mirror it.
    """
    matrix = _side_data(frame).get("DISPLAYMATRIX")
    return Orientation() if matrix is None else orientation_of(struct.unpack("=9i", bytes(matrix)[:36]), file)


def orientation_of(matrix: tuple[int, ...], file: Path) -> Orientation:
    """The orientation that a matrix a, b, u, c, d, v, x, y, w stands for.

    It shows the stored point (x, y) at (a x + c y, b x + d y), moved back into the picture. Scale is not looked at:
    FFmpeg makes it part of the pixels' aspect.

    Raises:
        DataError: DATA-096.
    """
    a, b, u, c, d, v = matrix[:6]
    straight, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if u == v == 0 and straight > 0 and max(abs(b), abs(c)) <= _SLANT * straight:
        return Orientation(False, flip_rows=d < 0, flip_columns=a < 0)
    if u == v == 0 and across > 0 and max(abs(a), abs(d)) <= _SLANT * across:
        return Orientation(True, flip_rows=b < 0, flip_columns=c < 0)
    found = "[" + ", ".join(f"{value / 65536:g}" for value in (a, b, c, d)) + "]"
    message = f"{file} is to be shown with the display matrix {found}; quarter turns and mirror images can be read."
    raise DataError("DATA-096", message, "Encode it as it is to be shown (ffmpeg -i FILE upright.mp4).")


def _side_data(frame: Any) -> Any:
    """The side data of a frame. PyAV lists none where it does not know one of its kinds, which FFmpeg then removes."""
    try:
        return frame.side_data
    except ValueError:
        known = {kind.value for kind in av.sidedata.sidedata.Type}
        graph = av.filter.Graph()
        last = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
        for number in set(range(_MAX_KINDS)) - known:
            following = graph.add("sidedata", f"mode=delete:type={number}")
            last.link_to(following)
            last = following
        sink = graph.add("buffersink")
        last.link_to(sink)
        graph.configure()
        graph.push(frame)
        return graph.pull().side_data
