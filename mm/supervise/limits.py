"""Time limits of phases, after which the watch takes a process for a hang."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

OPENING, SAVE_BEFORE, LAST_SAVE = "waiting for the folder's lock", "waiting for the save before", "the last save"
PREPARING = "looking at the clips whose features are to be made"
"""Phases around the steps that have a limit of their own, or none."""


@dataclass(frozen=True)
class Limits:
    """Time that a process may stay in one phase, in seconds.

    Attributes:
        fixed: `--hang-timeout`; None chooses by phase.
        ceiling: below the time limit of collectives, which would end the job with a poorer message.
        patience: the least, whatever is said above, for phases that wait for something with a limit of its own, whose
            end says more; infinite where the wait has none.
    """

    fixed: float | None
    ceiling: float
    patience: Mapping[str, float] = field(default_factory=dict)

    def of(self, phase: str, step_s: list[float], last_s: float) -> float:
        """The limit of a phase, from the seconds of the last steps and of the last time in this phase."""
        return max(self._usual(phase, step_s, last_s), self.patience.get(phase, 0.0))

    def _usual(self, phase: str, step_s: list[float], last_s: float) -> float:
        if self.fixed is not None:
            return self.fixed
        if len(step_s) < 2 or phase == "evaluation and validation":
            limit = 1800.0  # starting, compiling, the first messages; rendering clips
        elif phase == "saving":
            limit = 600.0
        else:
            limit = max(120.0, 10 * statistics.median(step_s))
        return min(max(limit, 3 * last_s), self.ceiling)
