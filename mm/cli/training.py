"""A training run from its sections to its end: checked, its processes joined, trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mm.cli.imports import large_imports
from mm.config.place import ProcessPlace, process_place
from mm.config.rules.training import check_training, require_places
from mm.config.run.training import TrainingRun
from mm.dialects.mindspeed.validation import read_validation
from mm.stopping import StopRequest

if TYPE_CHECKING:  # torch comes later
    from mm.train.callbacks.base import Callback
    from mm.train.sinks.base import Sink

_KEPT = "Nothing was saved since the newest checkpoint ({} saves before it stops)."


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
    validation, problems = read_validation(sections)
    check_training(sections.model_copy(update={"problems": (*sections.problems, *problems)}))
    require_places(sections)

    # Only now torch: a configuration mistake is told in a fraction of a second, before any device is touched.
    with large_imports():
        from mm.train.job import train_in_job

    if where.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)
    progress = train_in_job(
        sections,
        where,
        validation=validation,
        stop=stop if sections.checkpoint.save_on_signal else None,
        callbacks=callbacks,
        sinks=sinks,
    )
    logging.getLogger(__name__).info("done: step %d, %d samples", progress.step, progress.trained_samples)
