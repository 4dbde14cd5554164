"""Paths of a camera: rows of 19 numbers, read from a file, stretched over a video, or made of a direction and a speed.

A row is a time stamp, the focal lengths fx and fy and the optical centre cx and cy as fractions of the picture's width
and height, two numbers of a lens that must be 0, and the 3x4 matrix from world to camera, row by row.

Source: RealEstate10K's files as CameraCtrl and VideoX-Fun read them; directions are those of DiffSynth-Studio.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.errors import ConfigError, DataError, Problem, raise_all

NUMBERS_A_ROW = 19
FOCAL_LENGTHS, CENTRES, LENS, MATRIX = slice(1, 3), slice(3, 5), slice(5, 7), slice(7, 19)
ORIGIN = (0, 0.532139961, 0.946026558, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0)
"""Row of a camera that has not moved, with the focal lengths of Control-Camera's own paths."""
SPEED = 1 / 54
"""Number by which a direction changes its entry of the matrix from one frame to the next."""
_MOST_PROBLEMS = 20
_MOVES = {
    "Left": (9, 1),
    "Right": (9, -1),
    "Up": (13, 1),
    "Down": (13, -1),
    "In": (18, -1),
    "Out": (18, 1),
}
"""Entry of a row that a direction changes, and the sign. 9 and 13 turn the view (for small angles), 18 moves the camera
along it."""
_FORM = "timestamp fx fy cx cy 0 0 and the 3x4 matrix from world to camera"


def read_poses(file: Path) -> Tensor:
    """Rows of a pose file, [poses, 19] fp64; see `parse_poses`.

    Raises:
        DataError: DATA-001 for a file that cannot be read.
        ConfigError: CFG-250 for one that is malformed.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"The pose file {file} cannot be read ({error})."
        raise DataError("DATA-001", found, "Give a text file, or correct its path.") from None
    return parse_poses(text, str(file))


def parse_poses(text: str, name: str) -> Tensor:
    """Rows of a pose file's text: a first line that is not looked at (an address, or empty), then one pose a line.

    Args:
        text: the file's. name: what to call it.

    Returns:
        [poses, 19] fp64.

    Raises:
        ConfigError: CFG-250 for each line that has not 19 numbers or none that a camera has, by its number; for a pose
            in the first line, and for a file without poses.
    """
    first, *lines = text.rstrip().split("\n")
    if not lines:
        found = f"{name} has no poses, expected a first line (an address, or empty) and a pose a line after it."
        raise ConfigError("CFG-250", found, f"Write {_FORM} on each line.")
    problems = []
    if not isinstance(_row(first), str):
        found = f"{name} line 1 is a pose, expected an address or nothing: no system reads the first line."
        problems.append(Problem("CFG-250", found, "Put a line in front."))
    rows = [_row(line) for line in lines]
    for number, row in enumerate(rows, start=2):
        if isinstance(row, str):
            problems.append(Problem("CFG-250", f"{name} line {number} {row}.", f"Write {_FORM}."))
    if len(problems) > _MOST_PROBLEMS:
        more = f"{name} has {len(problems) - _MOST_PROBLEMS} more such lines."
        problems[_MOST_PROBLEMS:] = [Problem("CFG-250", more, "Correct those above first.")]
    raise_all(ConfigError, problems)
    return torch.tensor(rows, dtype=torch.float64)


def rows_of_frames(rows: Tensor, num_video_frames: int, indices: Iterable[int]) -> Tensor:
    """Rows of some frames of a video over which a path is stretched, its ends on the video's ends.

    Between two poses all numbers, those of the matrix too, are interpolated linearly, as VideoX-Fun does.

    Args:
        rows: [poses, 19]. num_video_frames: of the whole video. indices: of the frames that the clip takes.

    Returns:
        [len(indices), 19] fp64.

    Raises:
        ConfigError: CFG-258 for a frame that the video does not have.
    """
    taken = list(indices)
    outside = [index for index in taken if not 0 <= index < num_video_frames]
    if outside:
        message = f"Poses are asked for frame {outside[0]} of a video of {num_video_frames} frames."
        raise ConfigError("CFG-258", message, "Give frames that the video has.")
    rows = rows.double()
    scale = (len(rows) - 1) / max(num_video_frames - 1, 1)
    places = torch.tensor(taken, dtype=torch.float64) * scale
    before = places.long().clamp(max=max(len(rows) - 2, 0))
    after = (before + 1).clamp(max=len(rows) - 1)
    return torch.lerp(rows[before], rows[after], (places - before)[:, None])


def direction_rows(direction: str, num_frames: int, speed: float = SPEED, origin: Sequence[float] = ORIGIN) -> Tensor:
    """Rows of a camera that moves evenly, [num_frames, 19] fp64.

    Args:
        direction: Left, Right, Up, Down, In, Out or several of these without opposites, such as LeftUp or RightDownIn.
        num_frames: of the clip. speed: by which each frame differs from the one before. origin: the first frame's row.

    Raises:
        ConfigError: CFG-251 for another direction, CFG-257 for a speed or an origin that is none.
    """
    if not math.isfinite(speed):
        raise ConfigError("CFG-257", f"The camera's speed is {speed}.", f"Give a number; {SPEED:.3g} is usual.")
    fault = _fault(origin) if len(origin) == NUMBERS_A_ROW else f"has {len(origin)} numbers, expected {NUMBERS_A_ROW}"
    if fault:
        raise ConfigError("CFG-257", f"The camera's origin {fault}.", f"Give {_FORM}.")
    rows = torch.tensor([list(origin)], dtype=torch.float64).repeat(num_frames, 1)
    for word in _words(direction):
        entry, sign = _MOVES[word]
        rows[:, entry] += sign * speed * torch.arange(num_frames, dtype=torch.float64)
    return rows


def _words(direction: str) -> list[str]:
    """The words of a direction: each once, and no two that change one entry."""
    words = re.findall("|".join(_MOVES), direction)
    if not words or "".join(words) != direction or len({_MOVES[word][0] for word in words}) < len(words):
        found = f"{direction!r} is no direction of a camera."
        raise ConfigError("CFG-251", found, f"Give {', '.join(_MOVES)} or several that go together, such as LeftUp.")
    return words


def _row(line: str) -> list[float] | str:
    """The 19 numbers of a line, or what is wrong with it."""
    words = line.split()
    if len(words) != NUMBERS_A_ROW:
        return f"has {len(words)} words, expected {NUMBERS_A_ROW} numbers"
    row = []
    for word in words:
        try:
            row.append(float(word.replace("_", "no digit")))
        except ValueError:
            return f"has {word[:40]!r} among its numbers"
    return _fault(row) or row


def _fault(row: Sequence[float]) -> str | None:
    """Name what no camera has, of 19 numbers."""
    if not all(map(math.isfinite, row)):
        return "holds a number that is not finite"
    if min(row[FOCAL_LENGTHS]) <= 0:
        return f"has focal lengths {row[1]:g} and {row[2]:g}, expected numbers above 0"
    if any(row[LENS]):
        return f"has {row[5]:g} and {row[6]:g} behind the centre, expected 0 and 0: lenses are not corrected"
    turn = torch.tensor(list(row[MATRIX]), dtype=torch.float64).view(3, 4)[:, :3]
    if not 0.5 < float(torch.linalg.det(turn)) < 2:
        return f"has a matrix of determinant {float(torch.linalg.det(turn)):g}, expected a rotation's, which is 1"
    return None
