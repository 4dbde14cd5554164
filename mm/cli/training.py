"""A training run from its sections to its end: checked, its processes joined, trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.config.layout import layout_of
from mm.config.output import require_writable_folder
from mm.config.place import ProcessPlace, process_place
from mm.config.rules.training import check_training
from mm.config.run.training import TrainingRun
from mm.dialects.mindspeed.validation import load_validation
from mm.stopping import StopRequest

if TYPE_CHECKING:  # torch comes later
    from mm.train.callbacks.base import Callback
    from mm.train.sinks.base import Sink

_KEPT = "Nothing was saved since the newest checkpoint ({} saves before it stops)."

SAVING_MINUTES = 24 * 60
"""How long ranks wait for the slowest one's disk in a background save; a process that is gone ends it at once."""


def train(
    read: Callable[[ProcessPlace], TrainingRun],
    *,
    saves: bool,
    word: str,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[Sink] = (),
) -> None:
    """Train.

    Args:
        read: reads the run for this process's place.
        saves: whether the run saves when a signal asks it to stop. word: the user's word for that.
        callbacks, sinks: further ones, of a script around the command.

    Raises:
        MMError: what `read`, the rules and `mm.train.loop.train` raise, and `StopRequest` when the process is asked to
            end.
    """
    with StopRequest(saves=saves, kept=_KEPT.format(word)) as stop:
        _train(read, stop, callbacks, sinks)


def _train(
    read: Callable[[ProcessPlace], TrainingRun],
    stop: StopRequest,
    callbacks: Sequence[Callback],
    sinks: Sequence[Sink],
) -> None:
    where = process_place()
    sections = read(where)
    check_training(sections)
    _require_places(sections)
    validation = load_validation(sections)
    layout = layout_of(sections)

    # Only now torch: a configuration mistake is told in a fraction of a second, before any device is touched.
    from mm.checkpoint.comm import Comm, ProcessGroupComm, SingleProcess
    from mm.data.dataset import open_features
    from mm.device.backend import deterministic, select
    from mm.lora.plan import plan_of
    from mm.ops.elementwise.dispatch import choice_of
    from mm.parallel.mesh import build_mesh
    from mm.supervise.job import Job
    from mm.supervise.mailbox import Mailbox
    from mm.supervise.watchdog import ANSWER_S, Watchdog
    from mm.train.loop import train as take_steps
    from mm.train.run import Run, watch_limits

    if where.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    for note in sections.notes:
        logging.getLogger(__name__).info("%s", note)
    lora = plan_of(sections.adapters, sections.wan)
    dataset = open_features(sections.data.features, sections.wan)
    evaluation = sections.evaluation
    held_out = open_features(evaluation.features, sections.wan) if evaluation is not None else None
    backend = select(sections.training.device, where.local_rank, where.world_size)
    timeout = sections.supervision.timeout_minutes
    configuration = {
        "elementwise operators": choice_of(backend.device).name,
        **sections.origins.grouped(sections.values()),
        sections.validation.config if sections.validation else "validation": (
            validation.model_dump(mode="json") if validation else None
        ),
    }
    save = Path(sections.checkpoint.save) if sections.checkpoint.save is not None else None
    with (
        deterministic(sections.training.deterministic),
        Job(where, backend.collective, backend.device, timeout, configuration) as job,
        Watchdog(
            Mailbox(job.messages(ANSWER_S), where.rank, where.world_size, job.remember),
            watch_limits(sections),
            save / "hang" if save is not None else None,
            sampling=sections.supervision.straggler_interval is not None,
        ) as watch,
        build_mesh(layout, timeout, backend.kind) as mesh,
    ):
        comm: Comm = SingleProcess()
        saving: Comm | None = comm if sections.checkpoint.in_background else None
        if where.world_size > 1:
            comm = ProcessGroupComm(device=backend.device)
            saving = ProcessGroupComm(job.host_group(SAVING_MINUTES)) if sections.checkpoint.in_background else None
        progress = take_steps(
            Run(
                sections,
                dataset,
                mesh,
                backend,
                comm,
                watch,
                stop if sections.checkpoint.save_on_signal else None,
                where.local_world_size,
                lora=lora,
                saving=saving,
                held_out=held_out,
                validation=validation,
            ),
            callbacks,
            sinks,
        )
    logging.getLogger(__name__).info("done: step %d, %d samples", progress.step, progress.consumed_samples)


def _require_places(sections: TrainingRun) -> None:
    places = {"checkpoint.save": sections.checkpoint.save, "logging.tensorboard": sections.logging.tensorboard}
    for path, folder in places.items():
        if folder is not None:
            require_writable_folder(folder, sections.origins[path].name)
