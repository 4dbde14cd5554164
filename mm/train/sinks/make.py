"""The sinks of a run: the one list."""

from __future__ import annotations

from pathlib import Path

from mm.train.run import Run
from mm.train.sinks.base import Sink
from mm.train.sinks.console import Console
from mm.train.sinks.json_lines import JsonLines
from mm.train.sinks.tensorboard import TensorBoard


def make_sinks(run: Run) -> list[Sink]:
    """The sinks that the configuration asks for, on the rank that reports, in the order in which they get a record."""
    flags, sinks = run.flags, list[Sink]()
    if not run.reports:
        return sinks
    if flags.save is not None:
        sinks.append(JsonLines(Path(flags.save)))
    if flags.tensorboard_dir is not None:
        sinks.append(TensorBoard(Path(flags.tensorboard_dir)))
    elif flags.save is not None:
        sinks.append(TensorBoard(Path(flags.save) / "tensorboard"))
    sinks.append(Console(flags.log_interval, progress_bar=not flags.no_progress_bar))
    return sinks
