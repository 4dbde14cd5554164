"""The training run from start to end: model on the mesh, weights or checkpoint, closed steps, what happens around."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from mm.checkpoint.comm import on_rank_zero
from mm.checkpoint.directory import require_experts_folder, writing
from mm.checkpoint.lock import Lock
from mm.config.run.experts import expert_folders
from mm.supervise.limits import OPENING
from mm.train.build import check_sizes, settings_of, write_run_file
from mm.train.callbacks.base import Callback
from mm.train.callbacks.checkpointing import open_checkpointing
from mm.train.callbacks.make import make_callbacks, make_checks, missing_checks
from mm.train.closed_step import ClosedStep
from mm.train.models import Models, start_models
from mm.train.records import drop_repeated_steps
from mm.train.run import Run
from mm.train.sinks.base import Sink, Write, opened
from mm.train.sinks.make import make_sinks
from mm.train.start import memory_watch
from mm.train.state import Progress

logger = logging.getLogger(__name__)


def train(run: Run, callbacks: Sequence[Callback] = (), sinks: Sequence[Sink] = ()) -> Progress:
    """Train until all steps are taken, going on from the newest checkpoint in the run's folder if there is one.

    Args:
        run: what to train.
        callbacks: further ones, called after those of the configuration and before a run leaves because of a signal.
        sinks: further ones, of rank 0.

    Returns:
        Where the run ended.

    Raises:
        ConfigError: CFG-046 when samples of different sizes would cross a pipeline that was not told so; CFG-049 or
            CFG-185 when offload or background saves need more host memory than is free; CFG-068 when blocks would be
            compiled for too many sizes. DataError: DATA-077 when samples are longer than a packed sequence may be.
        OutOfMemoryError: MEM-001 when the device has no room for the model or a step.
        CheckpointError, ConfigError, NumericsError: as documented where they arise.
    """
    sections, save = run.sections, run.sections.checkpoint.save
    check_sizes(run)
    steps, memory = settings_of(run), memory_watch(run)
    with ExitStack() as stack:
        locks = _open_folders(run, stack)
        checks = make_checks(run)
        models = start_models(run, steps, memory)
        started = models.first
        step, total = started.progress.step, sections.training.steps
        for callback in callbacks:
            with started.during(callback.phase):
                on_rank_zero(run.comm, callback.begin)
        missing = missing_checks([*checks, *callbacks], step, last=step == total, comm=run.comm)
        if step >= total and not missing:
            logger.info("step %d of %d is already done; nothing to train", step, total)
            return started.progress
        write_run_file(run)
        rows = drop_repeated_steps(Path(save), step + 1) if save is not None and run.reports else []
        every_sink = [*make_sinks(run), *sinks] if run.reports else []
        write = stack.enter_context(opened(every_sink, step + 1, total))
        for check in missing:
            with started.during(check.phase):
                write(check.look(models, step))
        checkpointing = open_checkpointing(run, models, locks, stack)
        losses = [float.fromhex(row.loss_hex) for row in rows]
        around = make_callbacks(run, started, checkpointing, [*checks, *callbacks], losses)
        return _steps(run, models, around, write)


def _steps(run: Run, models: Models, callbacks: Sequence[Callback], write: Write) -> Progress:
    started, progress = models.first, models.first.progress
    # closed here: readers that are left would outlive the error that ends the steps, and hold the process up
    with closing(ClosedStep(run, models, progress, started.during)) as step:
        if run.stop is not None:
            run.stop.begin_steps()
        while progress.step < run.sections.training.steps:
            done = step.take(progress)
            progress = done.progress
            for callback in callbacks:
                if callback.is_due(done) and (callback.collective or run.reports):
                    with started.during(callback.phase):
                        write(callback.after_step(done))
        for callback in callbacks:
            callback.finish()
    return progress


def _open_folders(run: Run, stack: ExitStack) -> list[Lock]:
    """Take the lock of `--save`, and of the folders of two experts, on rank 0, for as long as the run goes on.

    Returns:
        Those of the folders that checkpoints are written to, on rank 0; none without `--save`.
    """
    save = run.sections.checkpoint.save
    if save is None:
        return []
    with run.watch.during(OPENING):  # a phase of its own
        locks = [stack.enter_context(writing(Path(save), run.comm))]
        on_rank_zero(run.comm, lambda: require_experts_folder(Path(save), experts=run.sections.experts is not None))
        if run.sections.experts is not None:
            locks = [stack.enter_context(writing(folder, run.comm)) for folder in expert_folders(save)]
    return [lock for lock in locks if lock is not None]
