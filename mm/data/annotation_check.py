"""Comparison of what an annotation says of a video or image with what it is."""

from __future__ import annotations

from typing import NamedTuple

from mm.data.files import raise_limited
from mm.data.metadata import VideoSample
from mm.data.video import VideoInfo
from mm.errors import Problem


def check_annotation(sample: VideoSample, info: VideoInfo) -> None:
    """Compare what the annotation says with the video.

    `num_frames` is compared only where there is no `cut`, which may be counted or not. `resolution` may be that of the
    picture as it is stored upright or, where pixels are not square, as it is shown: tools tell either.

    Raises:
        DataError: DATA-005, all differences at once.
    """
    shown = _Size(*info.shown_size)
    _compare(sample, info.num_frames, _Size(info.height, info.width), shown)


def check_image(sample: VideoSample, height: int, width: int) -> None:
    """`check_annotation` of an image; raises what that does."""
    size = _Size(height, width)
    _compare(sample, 1, size, size)


class _Size(NamedTuple):
    height: int
    width: int


def _compare(sample: VideoSample, num_frames: int, stored: _Size, shown: _Size) -> None:
    said = sample.annotation
    problems = []
    if said.num_frames is not None and said.cut is None and said.num_frames != num_frames:
        problems.append(_differs(sample, f"num_frames {said.num_frames}", f"{num_frames} frames"))
    if said.resolution is not None and (said.resolution.height, said.resolution.width) not in (stored, shown):
        claimed = f"height {said.resolution.height}, width {said.resolution.width}"
        as_shown = "" if stored == shown else f", shown as {shown.height} x {shown.width}"
        problems.append(_differs(sample, claimed, f"height {stored.height}, width {stored.width}{as_shown}"))
    raise_limited(problems)


def _differs(sample: VideoSample, claimed: str, found: str) -> Problem:
    message = f"{sample.where}: the annotation says {claimed}, the {sample.kind} has {found}."
    return Problem("DATA-005", message, f"Correct the annotation, or replace the {sample.kind} if it is the wrong one.")
