"""`mm doctor costs RUN`: costs of tokens and of pairs of tokens, fitted to the step times of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.errors import ConfigError

_HELP = """Fit costs of tokens and of pairs of tokens to the step times in a run's metrics.jsonl.
It needs 25 steps or more on samples of several lengths, on a device that nothing else uses."""

_EXPLAINED = 0.9
"""Least part of the variance of step times for a fit that is worth dealing by."""


def main(argv: Sequence[str]) -> None:
    """Print the costs that a run measured, and the value of `data.pair_cost` that they mean.

    Raises:
        ConfigError: CFG-006 unless one path is given.
        CheckpointError: CKPT-070 for a metrics.jsonl that is missing or damaged.
        DataError: DATA-230 where nothing can be told.
    """
    if list(argv) in (["-h"], ["--help"]):
        print(f"usage: mm doctor costs RUN\n\n{_HELP}")
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        found = f"mm doctor costs takes one run, its folder or metrics.jsonl, and got {' '.join(argv) or 'none'}."
        raise ConfigError("CFG-006", found, "Give exactly one.")
    from mm.doctor.costs import WARM_UP, measured_cost
    from mm.train.records import METRICS_FILE, read_metrics

    path = Path(argv[0])
    file = path / METRICS_FILE if path.is_dir() else path
    cost = measured_cost(read_metrics(file), str(file))
    print(f"{file}: step times of {cost.steps} steps, without the first {WARM_UP}; costs of all replicas together")
    print(f"a step by itself  {cost.constant:.3g} s")
    print(f"a token           {cost.alpha:.3g} s")
    print(f"a pair of tokens  {cost.beta:.3g} s")
    print(f"explained         {cost.explained:.1%} of the variance of step times")
    if cost.beta == 0 or cost.explained < _EXPLAINED:
        print("take no data.pair_cost from this run: its samples are too short or too alike, or other work took time")
        return
    print(f"data.pair_cost: {cost.pair_cost:.4g}   (--pair-cost {cost.pair_cost:.4g})")
