"""The callbacks of a run: the one list, in the order in which they are called after a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mm.checkpoint.comm import Comm
from mm.config.run.around import validation_folder
from mm.parallel.replica import leads_replica
from mm.train.callbacks.base import Callback, ModelCheck
from mm.train.callbacks.checkpointing import Checkpointing, SaveOutcome
from mm.train.callbacks.evaluation import Evaluation
from mm.train.callbacks.live import LiveCounts
from mm.train.callbacks.metrics import Metrics
from mm.train.callbacks.norms import Norms
from mm.train.callbacks.replica_hash import ReplicaHash
from mm.train.callbacks.stopping import Stopping
from mm.train.callbacks.stragglers import Stragglers
from mm.train.run import Run
from mm.train.start import Started


def make_callbacks(
    run: Run, started: Started, checkpointing: Checkpointing | None, others: Sequence[Callback], losses: Iterable[float]
) -> list[Callback]:
    """The callbacks that the configuration asks for, with others.

    Args:
        run, started: the run. checkpointing: its checkpoints, if it has any.
        others: what `make_checks` gave, and those from outside. losses: of the steps before, on the rank that reports.
    """
    asked, callbacks = run.sections.supervision, list[Callback]()
    if checkpointing is not None:
        callbacks.append(SaveOutcome(checkpointing))
    callbacks.append(Metrics(run, losses))
    norms_interval = run.sections.logging.norms_interval
    if norms_interval is not None:
        callbacks.append(Norms(norms_interval))
    if run.live is not None:
        callbacks.append(LiveCounts(run, run.live.made, leads=leads_replica(run.mesh)))
    if asked.straggler_interval is not None and run.comm.world_size > 1:
        callbacks.append(Stragglers(run.watch, run.mesh, run.backend, asked.straggler_interval))
    if asked.replica_hash_interval is not None:
        callbacks.append(ReplicaHash(asked.replica_hash_interval))
    if checkpointing is not None:
        callbacks.append(checkpointing)
    callbacks += others
    if checkpointing is not None and run.stop is not None:
        checks = [callback for callback in callbacks if isinstance(callback, ModelCheck)]
        callbacks.append(Stopping(run.stop, started, checkpointing, checks))
    return callbacks


def make_checks(run: Run) -> list[ModelCheck]:
    """The looks at the model, which may load and encode what they need: made before the model takes the memory.

    Raises:
        ConfigError, DataError: what `mm.train.callbacks.rendering.Rendering` raises.
    """
    evaluation, validation, save = run.sections.evaluation, run.sections.validation, run.sections.checkpoint.save
    checks: list[ModelCheck] = []
    if run.held_out is not None and evaluation is not None:
        folder = None if save is None else Path(save)
        checks.append(Evaluation(run.held_out, run.comm, evaluation.interval, folder))
    if run.validation is not None and validation is not None and save is not None:
        # Only here: the encoders' libraries take a third of the time in which a training process starts.
        from mm.generate.render import Processes
        from mm.train.callbacks.rendering import Rendering

        processes = Processes(run.mesh, run.backend, run.comm)
        folder = validation_folder(save)
        rendering = Rendering(run.validation, processes, validation.interval, folder, run.sections, run.dataset)
        checks.append(rendering)
    return checks


def missing_checks(callbacks: Sequence[Callback], step: int, *, last: bool, comm: Comm) -> list[ModelCheck]:
    """The looks that were due after a step and are not there: the run was stopped between saving and looking.

    Every rank calls it, and all are told what rank 0 sees.

    Raises:
        CheckpointError: what `ModelCheck.is_missing` raises.
    """
    checks = [callback for callback in callbacks if isinstance(callback, ModelCheck)]
    if step == 0 or not checks:
        return []
    missing: list[int] = []
    if comm.rank == 0:
        due = [index for index, check in enumerate(checks) if check.every.is_due(step, last=last)]
        missing = [index for index in due if checks[index].is_missing(step)]
    return [checks[index] for index in comm.broadcast_object(missing)]
