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
    asked, save, sinks = run.sections.logging, run.sections.checkpoint.save, list[Sink]()
    if not run.reports:
        return sinks
    if save is not None:
        sinks.append(JsonLines(Path(save)))
    if asked.tensorboard is not None:
        sinks.append(TensorBoard(Path(asked.tensorboard)))
    elif save is not None:
        sinks.append(TensorBoard(Path(save) / "tensorboard"))
    sinks.append(Console(asked.interval, progress_bar=asked.progress_bar))
    return sinks
