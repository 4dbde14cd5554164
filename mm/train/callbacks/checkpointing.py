"""Writes the run's state, beside the steps or between them, and says what is done where that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mm.checkpoint.background import BackgroundSaver
from mm.checkpoint.lock import Lock
from mm.checkpoint.store import save
from mm.config.step import StepSettings
from mm.device.queues import queues_of
from mm.errors import CheckpointError
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel
from mm.supervise.limits import LAST_SAVE, SAVE_BEFORE
from mm.train.adapters import AdapterRun
from mm.train.build import require_memory_for_saving
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.mindspeed_state import save_weights
from mm.train.records import Record
from mm.train.run import Run
from mm.train.start import Started
from mm.train.state import Progress, state_of

logger = logging.getLogger(__name__)

_OF_THE_DISK = ("CKPT-030", "CKPT-031")
"""No room, or refused by the file system: what may be over at the next save."""


class Checkpointing(Callback):
    """The checkpoints of one run in `--save`; inside `mm.checkpoint.store.writing`."""

    phase = "saving"

    def __init__(
        self,
        run: Run,
        steps: StepSettings,
        optimizer: Optimizer,
        adapters: AdapterRun | None,
        background: BackgroundSaver | None,
        lock: Lock | None,
    ) -> None:
        """Write below `--save`, which the run must have.

        Args:
            run: the run. steps: what its steps mean, which is recorded.
            optimizer, adapters: what is saved, and of the MM format the model.
            background: writes beside the steps; None writes in the loop.
            lock: of the folder, on rank 0.
        """
        asked = run.sections.checkpoint
        if asked.save is None:
            raise ValueError("a run without a folder has no checkpoints")
        self.every = Every(asked.save_interval, at_end=True, when_stopping=True)
        self._run, self._root, self._steps = run, Path(asked.save), steps
        self._optimizer, self._adapters, self._background, self._lock = optimizer, adapters, background, lock
        self._saved_step = 0

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Write a checkpoint, or begin to; `--on-save-failure warn` may pass over a disk that refuses all but the last.

        Raises:
            CheckpointError: of this save, or of the one before where that went on in the background.
        """
        self._save(done, may_fail=not (done.stopping or done.last))
        return ()

    def leave(self, done: StepDone, started: Started) -> None:
        """Have the step on disk, because the run ends with it; it may be there already.

        Raises:
            CheckpointError: of its save.
        """
        if self._saved_step != done.step:
            with started.during(self.phase):
                self._save(done, may_fail=False)
        self.finish()

    def _save(self, done: StepDone, *, may_fail: bool) -> None:
        with self._passing_over(done.step, when=may_fail):
            self._write(done.progress, done.parallel)
            self._saved_step = done.step

    def look(self) -> None:
        """See how the save in the background has ended, if it has; the same on every rank, not at the same step.

        Raises:
            CheckpointError: of that save, unless `--on-save-failure warn` passes over it; CKPT-100 on rank 0 when
                another job has taken the folder over.
        """
        if self._lock is not None:
            self._lock.require()
        if self._background is not None:
            with self._passing_over(None, when=True):
                self._background.check()

    def finish(self) -> None:
        """Wait until everything is on disk, however long that takes; the run ends with it.

        Raises:
            CheckpointError: of the last save.
        """
        if self._background is not None:
            with self._run.watch.during(LAST_SAVE):
                self._background.finish()

    def _write(self, progress: Progress, parallel: ParallelModel) -> None:
        run, started, asked = self._run, time.monotonic(), self._run.sections.checkpoint
        seed = run.sections.training.seed
        if asked.format == "torch":
            folder = save_weights(
                self._root,
                progress,
                parallel,
                self._optimizer,
                run.comm,
                seed=seed,
                steps=self._steps,
                keep_latest=asked.keep_latest,
                lock=self._lock,
            )
            logger.info("checkpoint %s (weights) written in %.1f s", folder.name, time.monotonic() - started)
            return
        state = state_of(
            self._optimizer,
            progress,
            run.config,
            seed,
            run.comm,
            steps=self._steps,
            with_optimizer=asked.save_optimizer,
            adapters=self._adapters.record if self._adapters is not None else None,
        )
        if self._background is not None:
            with self._run.watch.during(SAVE_BEFORE), self._passing_over(None, when=True):
                self._background.finish()
            self._background.start(state.step, state.pieces, state.scalars, asked.keep_latest, state.derived)
            return
        folder = save(
            self._root,
            state.step,
            state.pieces,
            state.scalars,
            run.comm,
            keep_latest=asked.keep_latest,
            derived=state.derived,
            lock=self._lock,
        )
        logger.info("checkpoint %s written in %.1f s", folder.name, time.monotonic() - started)

    @contextmanager
    def _passing_over(self, step: int | None, *, when: bool) -> Iterator[None]:
        """Tell a disk's refusal and go on, where the run and `when` say so."""
        try:
            yield
        except CheckpointError as error:
            if not when or self._run.sections.checkpoint.on_save_failure != "warn" or error.id not in _OF_THE_DISK:
                raise
            if self._run.reports:
                what = "the save in the background" if step is None else f"step {step}"
                asked = self._run.sections.origins["checkpoint.on_save_failure"].with_value("warn")
                logger.error("%s is not saved, the run goes on (%s): %s", what, asked, error)


class SaveOutcome(Callback):
    """Sees after every step how the save in the background has gone; before anything is told of the step."""

    every = Every(1)

    def __init__(self, checkpointing: Checkpointing) -> None:
        self._checkpointing = checkpointing

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """`Checkpointing.look`, with its errors."""
        self._checkpointing.look()
        return ()


def open_checkpointing(run: Run, started: Started, lock: Lock | None, stack: ExitStack) -> Checkpointing | None:
    """The checkpoints of a run, whose background saver ends with `stack`; None without `--save`.

    Raises:
        ConfigError: CFG-185 where a background save has too little host memory.
    """
    save_to = run.sections.checkpoint.save
    if save_to is None:
        return None
    background = None
    if run.saving is not None:
        started.memory.pinned_host += require_memory_for_saving(run, started.optimizer)
        saver = BackgroundSaver(Path(save_to), run.saving, queues_of(run.backend).host_memory, lock)
        background = stack.enter_context(saver)
    return Checkpointing(run, started.steps, started.optimizer, started.adapters, background, lock)
