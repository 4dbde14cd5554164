"""A checked run from where its processes join to where they part."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.checkpoint.comm import Comm, ProcessGroupComm, SingleProcess
from mm.config.layout import layout_of
from mm.config.place import ProcessPlace
from mm.config.rules.live import budget_bytes
from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun
from mm.data.dataset import open_features
from mm.device.backend import Backend, deterministic, select
from mm.lora.plan import plan_of
from mm.ops.elementwise.dispatch import choice_of
from mm.parallel.mesh import build_mesh
from mm.parallel.replica import leads_replica
from mm.stopping import StopRequest
from mm.supervise.job import Job
from mm.supervise.mailbox import Mailbox
from mm.supervise.watchdog import ANSWER_S, Watchdog
from mm.train.callbacks.base import Callback
from mm.train.live import live_stores
from mm.train.loop import train
from mm.train.run import Run, watch_limits
from mm.train.sinks.base import Sink
from mm.train.state import Progress

if TYPE_CHECKING:
    from mm.extract.live.opening import LiveStores

SAVING_MINUTES = 24 * 60
"""How long ranks wait for the slowest one's disk in a background save, and for the look at clips whose features are to
be made; a process that is gone ends it at once."""


def train_in_job(
    sections: TrainingRun,
    where: ProcessPlace,
    *,
    validation: GenerationRun | None = None,
    stop: StopRequest | None = None,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[Sink] = (),
) -> Progress:
    """Join the run's processes, train, and part.

    Args:
        sections: the run, accepted by `mm.config.rules.training.check_training`.
        where: this process's place. One process joins nobody, and leaves nothing behind.
        validation: what is rendered meanwhile.
        stop: notes signals; None where they end the process.
        callbacks, sinks: further ones.

    Raises:
        MMError: what `mm.supervise.job.Job` and `mm.train.loop.train` raise.
    """
    for note in sections.notes:
        logging.getLogger(__name__).info("%s", note)
    lora = plan_of(
        sections.adapters, sections.wan, *(sections.origins[f"adapters.{name}"].name for name in ("targets", "skip"))
    )
    dataset = None if sections.live is not None else open_features(sections.data.features, sections.wan)
    live: LiveStores | None = None
    evaluation = sections.evaluation
    held_out = open_features(evaluation.features, sections.wan) if evaluation is not None else None
    backend = select(sections.training.device, where.local_rank, where.world_size)
    timeout = sections.supervision.timeout_minutes
    save = Path(sections.checkpoint.save) if sections.checkpoint.save is not None else None
    with ExitStack() as stack:
        stack.enter_context(deterministic(sections.training.deterministic))
        configuration = _configuration(sections, backend, validation)
        job = stack.enter_context(Job(where, backend.collective, backend.device, timeout, configuration))
        watch = stack.enter_context(
            Watchdog(
                Mailbox(job.messages(ANSWER_S), where.rank, where.world_size, job.remember),
                watch_limits(sections),
                save / "hang" if save is not None else None,
                sampling=sections.supervision.straggler_interval is not None,
            )
        )
        mesh = stack.enter_context(build_mesh(layout_of(sections), timeout, backend.kind))
        comm, saving = _comms(sections, where, job, backend)
        if dataset is None:
            patient = SingleProcess() if where.world_size == 1 else ProcessGroupComm(job.host_group(SAVING_MINUTES))
            live = stack.enter_context(live_stores(sections, mesh, backend, patient, watch))
            dataset = open_features(sections.data.features, sections.wan, live.by_folder)
        run = Run(
            sections,
            dataset,
            mesh,
            backend,
            comm,
            watch,
            stop,
            where.local_world_size,
            lora=lora,
            saving=saving,
            held_out=held_out,
            validation=validation,
            live=live,
        )
        progress = train(run, callbacks, sinks)
    if live is not None and leads_replica(mesh):
        live.finish(backend.device, budget_bytes(sections))
    return progress


def _configuration(sections: TrainingRun, backend: Backend, validation: GenerationRun | None) -> dict[str, Any]:
    """Configuration that must be equal on all ranks, by the user's words."""
    return {
        "elementwise operators": choice_of(backend.device).name,
        **sections.origins.grouped(sections.values()),
        sections.validation.config if sections.validation else "validation": (
            validation.model_dump(mode="json") if validation else None
        ),
    }


def _comms(sections: TrainingRun, where: ProcessPlace, job: Job, backend: Backend) -> tuple[Comm, Comm | None]:
    """The ranks, and the ranks over a group of their own for saves in the background."""
    comm: Comm = SingleProcess()
    saving: Comm | None = comm if sections.checkpoint.in_background else None
    if where.world_size > 1:
        comm = ProcessGroupComm(device=backend.device)
        saving = ProcessGroupComm(job.host_group(SAVING_MINUTES)) if sections.checkpoint.in_background else None
    return comm, saving
