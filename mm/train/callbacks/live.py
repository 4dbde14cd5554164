"""Counts the samples whose features were made in a step, those that were kept, and those that were read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import LiveSamples, Record
from mm.train.run import Run

if TYPE_CHECKING:
    from mm.extract.live.store import Made

log = logging.getLogger(__name__)


class LiveCounts(Callback):
    """Makes the line of live.jsonl of every step."""

    every = Every(1)

    def __init__(self, run: Run, made: Made, *, leads: bool) -> None:
        """Begin to count.

        Args:
            run: the run. made: counts of this process. leads: whether this rank reads for its replica.
        """
        self._comm, self._made, self._leads = run.comm, made, leads
        self._before = made.encoded, made.kept
        self._totals = [0, 0, 0]

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Add up what the replicas did."""
        encoded, kept = self._made.encoded - self._before[0], self._made.kept - self._before[1]
        self._before = self._made.encoded, self._made.kept
        samples = sum(len(batch["sample"]) for batch in done.batches)
        everyone = self._comm.all_gather_object([encoded, kept, samples - encoded] if self._leads else [0, 0, 0])
        counts = [sum(column) for column in zip(*everyone, strict=True)]
        self._totals = [total + count for total, count in zip(self._totals, counts, strict=True)]
        return [LiveSamples(done.step, *counts)]

    def finish(self) -> None:
        """Say what was done in all."""
        encoded, kept, read = self._totals
        log.info("features of %d samples were made, of which %d are kept; those of %d were read", encoded, kept, read)
