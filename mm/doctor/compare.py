"""The first step in which two runs differ, from their metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mm.train.records import METRICS_FILE, read_metrics

FIELDS = ("consumed_samples", "timesteps", "lr", "sample_losses", "loss_hex", "grad_norm_hex", "skipped")
"""In the order in which one leads to the next: data and draws, the schedule, forward, the sum, backward."""
_MEANING = {
    "consumed_samples": "the global batches differ",
    "timesteps": "the samples of the first replica, their order or their draws differ: seed, data, layout",
    "lr": "the learning-rate schedules differ",
    "sample_losses": "the same draws gave other losses: weights, kernels or layout",
    "loss_hex": "equal losses of the first replica, another mean: the other replicas differ",
    "grad_norm_hex": "forward is equal, backward is not",
    "skipped": "one run left out an update",
}


@dataclass(frozen=True)
class Difference:
    """Point where two runs part: the step, the field, both values, and what that points to."""

    step: int
    field: str
    first: object
    second: object
    meaning: str


def first_difference(first: Path, second: Path) -> tuple[int, Difference | None]:
    """Compare two runs step by step, bit by bit.

    Args:
        first, second: each a metrics.jsonl or the folder that holds it.

    Returns:
        Steps that both have and that are equal, and the first difference; None where there is none, also where one run
        is longer.

    Raises:
        CheckpointError: CKPT-070 for a file that is missing or damaged.
    """
    ours, theirs = ({row.step: row for row in read_metrics(_file(path))} for path in (first, second))
    equal = 0
    for step in sorted(ours.keys() & theirs.keys()):
        for field in FIELDS:
            a, b = getattr(ours[step], field), getattr(theirs[step], field)
            # lines of runs before these fields existed
            if repr(a) != repr(b) and not (field in ("timesteps", "sample_losses") and () in (a, b)):
                return equal, Difference(step, field, a, b, _MEANING[field])
        equal += 1
    return equal, None


def _file(path: Path) -> Path:
    return path / METRICS_FILE if path.is_dir() else path
