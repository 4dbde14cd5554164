"""Leaves the run, saved, after the step in which a signal came (`--save-on-signal`)."""

from __future__ import annotations

from collections.abc import Sequence

from mm.errors import StoppedError
from mm.stopping import StopRequest
from mm.train.callbacks.base import Callback, Every, ModelCheck, StepDone
from mm.train.callbacks.checkpointing import Checkpointing
from mm.train.records import Record
from mm.train.start import Started


class Stopping(Callback):
    """Ends the run where a process was asked to; the last callback of a step."""

    every = Every(1)

    def __init__(
        self, stop: StopRequest, started: Started, checkpointing: Checkpointing, checks: Sequence[ModelCheck]
    ) -> None:
        """Leave on request.

        Args:
            stop: of this process. started: the run. checkpointing: has the step on disk before.
            checks: take minutes, in which a signal may come to some of the processes.
        """
        self._stop, self._started, self._checkpointing, self._checks = stop, started, checkpointing, checks

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Leave if asked to; a run that is at its end is done, not stopped.

        Raises:
            StoppedError: RUN-001.
            CheckpointError: where the step cannot be saved.
        """
        if done.last or not self._is_asked(done):
            return ()
        self._checkpointing.leave(done, self._started)
        by = self._stop.received
        self._stop.saved()
        raise StoppedError(
            "RUN-001",
            f"Stopped by {by or 'a signal to another process'} after step {done.step}, which is saved.",
            "Run the same command again; it goes on from there.",
        )

    def _is_asked(self, done: StepDone) -> bool:
        """Ask whether any process is to stop, by now; the same on every rank."""
        if not any(check.is_due(done) for check in self._checks):
            return done.stopping
        return any(self._started.run.comm.all_gather_object(self._started.run.is_asked_to_stop))
