"""The mean of a run's last losses, which says more than one of them: each is of the few timesteps its step drew."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW = 100
"""Losses that the mean is over; fewer at the start of a run."""


class RunningMean:
    """The mean of the last `WINDOW` losses that were finite; given the losses before, a resumed run has the same."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        """Begin with the losses of earlier steps, in order."""
        self._losses = deque((loss for loss in losses if math.isfinite(loss)), maxlen=WINDOW)

    def add(self, loss: float) -> None:
        """Take one step's loss; one that is not finite says nothing about the others and is left out."""
        if math.isfinite(loss):
            self._losses.append(loss)

    @property
    def count(self) -> int:
        """Losses it is over."""
        return len(self._losses)

    @property
    def value(self) -> float | None:
        """The mean, or None before the first finite loss."""
        return math.fsum(self._losses) / len(self._losses) if self._losses else None
