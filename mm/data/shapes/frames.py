"""Frames of a clip: how many of those that can be used, and which."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from mm.config.data import TEMPORAL_STRIDE

SAME_TIME = 1e-3  # seconds; containers round time stamps to as much


def whole_latents(num_frames: int) -> int:
    """The most frames, 4k + 1, of at least one."""
    return (num_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1


def fewer(num_frames: int, share: float, chance: torch.Generator) -> int:
    """The frames of a clip of at most `num_frames`: fewer, 5 or 9 or ..., for a share of clips, which all are alike."""
    lengths = range(TEMPORAL_STRIDE + 1, num_frames, TEMPORAL_STRIDE)
    if not lengths or float(torch.rand((), generator=chance, dtype=torch.float64)) >= share:
        return num_frames
    return lengths[int(torch.randint(len(lengths), (), generator=chance))]


def shortened(usable: int, multiple: int | None) -> int:
    """The frames of a clip of a video with too few: 4k + 1 of a whole number of multiples; 0 where there is none."""
    kept = usable if multiple is None else usable // multiple * multiple
    return whole_latents(kept) if kept else 0


def usable_at(times: Sequence[float], fps: float) -> int:
    """Number of frames that there are at a rate, from the first of some time stamps to the last."""
    return int((times[-1] - times[0] + SAME_TIME) * fps) + 1


def starts_at(times: Sequence[float], fps: float, length: int) -> int:
    """Number of first frames, from 0 on, after which there are `length` at a rate."""
    latest = times[-1] - (length - 1) / fps + SAME_TIME
    return max(1, sum(1 for time in times if time <= latest))


def frames_at_times(times: Sequence[float], start: int, fps: float, length: int) -> list[int]:
    """Frames nearest to every 1 / fps seconds from a first one on, the earlier of two that are equally near.

    Args:
        times: seconds of every frame, ascending. start: the first one. fps: the rate. length: how many.

    Returns:
        Their numbers, ascending; one may come several times where the rate is above the video's.
    """
    return [_nearest(times, times[start] + number / fps) for number in range(length)]


def _nearest(times: Sequence[float], moment: float) -> int:
    after = min(bisect_left(times, moment), len(times) - 1)
    before = max(0, after - 1)
    return before if moment - times[before] <= times[after] - moment + SAME_TIME else after
