"""Costs of samples as a run measured them: step time against the tokens of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mm.errors import DataError
from mm.train.records import StepMetrics

WARM_UP = 5
"""Steps at the beginning of a run, whose times are of compiling and warming up too."""

_FEWEST_STEPS = 20


@dataclass(frozen=True, slots=True)
class MeasuredCost:
    """Seconds of a step as c + alpha T + beta P, for T tokens and P pairs of tokens of one sample (sums of s and s^2).

    Attributes:
        constant, alpha, beta: seconds, of all replicas together.
        steps: it was fitted to. explained: part of the variance of their times that it explains.
    """

    constant: float
    alpha: float
    beta: float
    steps: int
    explained: float

    @property
    def pair_cost(self) -> float:
        """Cost of a pair of tokens by that of a token."""
        return self.beta / self.alpha


def measured_cost(rows: Sequence[StepMetrics], place: str) -> MeasuredCost:
    """Fit a run's step times by least squares, none of the parts below 0.

    A step takes as long as its dearest replica, which is close to the mean where micro-batches were dealt by cost.

    Args:
        rows: of metrics.jsonl. place: what to call it.

    Raises:
        DataError: DATA-230 for a run with too few steps, steps that are all alike, or times that tokens do not explain.
    """
    kept = [row for number, row in enumerate(rows) if number >= WARM_UP and row.tokens and not row.skipped]
    if len(kept) < _FEWEST_STEPS:
        raise _refusal(f"{place} has {len(kept)} steps to fit after {WARM_UP}", f"{_FEWEST_STEPS} are needed")
    seconds = np.array([row.step_time_s for row in kept])
    sums = np.array([[1.0, row.tokens, row.token_pairs] for row in kept])
    if np.linalg.matrix_rank(sums / sums.max(0)) < sums.shape[1]:
        raise _refusal(f"the steps of {place} have as many tokens each", "samples of several lengths are needed")
    constant, alpha, beta = (float(part) for part in _least_squares(sums, seconds))
    if alpha == 0:
        found = f"the step times of {place} do not grow with tokens"
        raise _refusal(found, "steps whose times they decide are needed")
    spread = float(((seconds - seconds.mean()) ** 2).sum())
    left = float(((seconds - sums @ np.array([constant, alpha, beta])) ** 2).sum())
    return MeasuredCost(constant, alpha, beta, len(kept), 1 - left / spread)


def _least_squares(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Factors of the columns, none below 0: a column whose factor would be is left out."""
    scale = rows.max(0)
    used = list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, used] / scale[used], values, rcond=None)
        if (found >= 0).all():
            break
        used.pop(int(found.argmin()))
    factors = np.zeros(rows.shape[1])
    factors[used] = found / scale[used]
    return factors


def _refusal(found: str, needed: str) -> DataError:
    remedy = (
        "Take a longer run, on samples of several lengths; without measured costs those of the model's shape are used."
    )
    return DataError("DATA-230", f"No costs can be told: {found}, and {needed}.", remedy)
