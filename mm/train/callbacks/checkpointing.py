"""Writes the run's state, beside the steps or between them, and says what is done where that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mm.checkpoint.background import BackgroundSaver
from mm.checkpoint.comm import on_rank_zero
from mm.checkpoint.directory import retain
from mm.checkpoint.lock import Lock
from mm.checkpoint.store import save
from mm.device.queues import queues_of
from mm.errors import CheckpointError
from mm.supervise.limits import LAST_SAVE, SAVE_BEFORE
from mm.train.build import require_memory_for_saving
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.mindspeed_state import save_weights
from mm.train.models import Models
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
        models: Models,
        background: BackgroundSaver | None,
        locks: Sequence[Lock],
    ) -> None:
        """Write below `--save`, which the run must have.

        Args:
            run: the run. models: what is saved, each in a folder of its own where there are several.
            background: writes beside the steps; None writes in the loop.
            locks: of the models' folders, on rank 0.
        """
        asked = run.sections.checkpoint
        if asked.save is None:
            raise ValueError("a run without a folder has no checkpoints")
        self.every = Every(asked.save_interval, at_end=True, when_stopping=True)
        self._run, self._models, self._background, self._locks = run, models, background, locks
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
            self._write_all(done.progress)
            self._saved_step = done.step

    def look(self) -> None:
        """See how the save in the background has ended, if it has; the same on every rank, not at the same step.

        Raises:
            CheckpointError: of that save, unless `--on-save-failure warn` passes over it; CKPT-100 on rank 0 when
                another job has taken the folder over.
        """
        for lock in self._locks:
            lock.require()
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

    def _write_all(self, progress: Progress) -> None:
        """Write every model; older checkpoints of experts go when the new one is in both folders."""
        keep, several = self._run.sections.checkpoint.keep_latest, len(self._models.started) > 1
        for model in self._models.each():
            self._write(model, progress, None if several else keep)
        if several:
            on_rank_zero(self._run.comm, lambda: self._retain(progress.step, keep))

    def _retain(self, step: int, keep_latest: int | None) -> None:
        for model in self._models.started:
            retain(_folder(model), step, keep_latest)

    def _write(self, model: Started, progress: Progress, keep_latest: int | None) -> None:
        run, started, asked = self._run, time.monotonic(), self._run.sections.checkpoint
        root, seed, lock = _folder(model), run.sections.training.seed, self._lock_of(model)
        if asked.format == "torch":
            folder = save_weights(
                root,
                progress,
                model.parallel,
                model.optimizer,
                run.comm,
                seed=seed,
                steps=model.steps,
                keep_latest=keep_latest,
                lock=lock,
            )
            logger.info("checkpoint %s (weights) written in %.1f s", folder.name, time.monotonic() - started)
            return
        state = state_of(
            model.optimizer,
            progress,
            run.config,
            seed,
            run.comm,
            steps=model.steps,
            with_optimizer=asked.save_optimizer,
            adapters=model.adapters.record if model.adapters is not None else None,
        )
        if self._background is not None:
            with self._run.watch.during(SAVE_BEFORE), self._passing_over(None, when=True):
                self._background.finish()
            self._background.start(state.step, state.pieces, state.scalars, keep_latest, state.derived)
            return
        folder = save(
            root,
            state.step,
            state.pieces,
            state.scalars,
            run.comm,
            keep_latest=keep_latest,
            derived=state.derived,
            lock=lock,
        )
        name = folder.relative_to(Path(asked.save or ""))
        logger.info("checkpoint %s written in %.1f s", name, time.monotonic() - started)

    def _lock_of(self, model: Started) -> Lock | None:
        pairs = zip(self._models.started, self._locks, strict=False)  # ranks but the first have no locks
        return next((lock for one, lock in pairs if one is model), None)

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


def _folder(model: Started) -> Path:
    """Folder of a model's checkpoints."""
    return Path(model.run.sections.checkpoint.save or "")


def open_checkpointing(run: Run, models: Models, locks: Sequence[Lock], stack: ExitStack) -> Checkpointing | None:
    """The checkpoints of a run, whose background saver ends with `stack`; None without `--save`.

    Raises:
        ConfigError: CFG-185 where a background save has too little host memory.
    """
    save_to = run.sections.checkpoint.save
    if save_to is None:
        return None
    background = None
    if run.saving is not None:
        models.first.memory.pinned_host += require_memory_for_saving(run, models.first.optimizer)
        lock = locks[0] if locks else None
        saver = BackgroundSaver(Path(save_to), run.saving, queues_of(run.backend).host_memory, lock)
        background = stack.enter_context(saver)
    return Checkpointing(run, models, background, locks)
