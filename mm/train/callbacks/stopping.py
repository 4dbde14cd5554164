"""Leaves the run, saved, after the step in which a signal came (`--save-on-signal`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mm.errors import StoppedError
from mm.stopping import StopRequest
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import Record


class Stopping(Callback):
    """Ends the run where a process was asked to; comes after what saves, and before what takes long."""

    every = Every(when_stopping=True)

    def __init__(self, stop: StopRequest, finish_saving: Callable[[], None]) -> None:
        """Leave on request.

        Args:
            stop: of this process. finish_saving: waits until the step is on disk.
        """
        self._stop, self._finish_saving = stop, finish_saving

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Leave; a run that is at its end is done, not stopped.

        Raises:
            StoppedError: RUN-001.
            CheckpointError: where the save in the background fails.
        """
        if done.last:
            return ()
        self._finish_saving()
        by = self._stop.received
        self._stop.saved()
        raise StoppedError(
            "RUN-001",
            f"Stopped by {by or 'a signal to another process'} after step {done.step}, which is saved.",
            "Run the same command again; it goes on from there.",
        )
