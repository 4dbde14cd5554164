"""Training from sections, with what was measured as the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mm.checkpoint.store import find_latest
from mm.config.base import validation_problems
from mm.config.place import process_place
from mm.config.rules.training import check_training, require_places
from mm.config.run.experts import expert_folders
from mm.config.run.file import load_training
from mm.config.run.training import TrainingRun, TrainingSections
from mm.config.unread import section_of
from mm.errors import ConfigError, Problem, raise_all
from mm.train.callbacks.base import Callback
from mm.train.job import train_in_job
from mm.train.records import Record, StepMetrics
from mm.train.sinks.base import Sink
from mm.train.state import Progress


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training.

    Attributes:
        progress: steps taken and samples seen, those before a resume included.
        records: all that was measured in this call, in order; none on the ranks beside the first.
        checkpoint: the folder of the newest checkpoint, which `load_model` takes, of two experts that for much
            noise; None where the run keeps none.
    """

    progress: Progress
    records: tuple[Record, ...]
    checkpoint: Path | None

    @property
    def steps(self) -> tuple[StepMetrics, ...]:
        """Loss, gradients' norm, rate and times of the steps taken in this call."""
        return tuple(record for record in self.records if isinstance(record, StepMetrics))


def train_model(
    run: TrainingRun | str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[Sink] = (),
) -> TrainingResult:
    """Train as `mm run` does, going on from the newest checkpoint in the run's folder if there is one.

    One process needs nothing around it: its process group is made and taken down inside. A script that torchrun starts
    calls this on every rank.

    Args:
        run: the sections, or a run.yaml (`mm translate` writes one; a run keeps its own beside its checkpoints).
        changes: other values by path, `{"training.steps": 10, "checkpoint.save": "out"}`.
        callbacks, sinks: further ones (docs/extending.md).

    Raises:
        ConfigError: what reading and the rules raise, all at once; CFG-003 to CFG-005 for changes; CFG-200 for a run
            that renders clips, whose description is a file of another system that only commands read; CFG-202 where the
            process is in a process group already.
        MMError: what `mm.train.loop.train` raises. A phase that makes no progress for its limit ends the process with
            code 124, as in a job.
    """
    where = process_place()
    sections = load_training(Path(run), where.world_size) if isinstance(run, (str, Path)) else run
    if changes or sections.world_size != where.world_size:
        sections = _changed(sections, changes or {}, where.world_size)
    if sections.validation is not None:
        found = f"{sections.word('validation.config')} describes clips to be rendered in words that only commands read."
        raise ConfigError("CFG-200", found, 'Give changes={"validation": None}, or use mm run.')
    check_training(sections)
    require_places(sections)
    seen = _Seen()
    progress = train_in_job(sections, where, callbacks=callbacks, sinks=[*sinks, seen])
    return TrainingResult(progress, tuple(seen.records), _newest(sections))


def _newest(run: TrainingRun) -> Path | None:
    save = run.checkpoint.save
    if save is None:
        return None
    first, *beside = [Path(save)] if run.experts is None else expert_folders(save)
    return find_latest(first, beside=beside)


class _Seen(Sink):
    """Keeps every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)


def _changed(run: TrainingRun, changes: Mapping[str, Any], world_size: int) -> TrainingRun:
    unknown = [path for path in changes if not _is_known(path)]
    raise_all(
        ConfigError,
        [Problem("CFG-003", f'changes has the unknown key "{path}".', "Correct or remove it.") for path in unknown],
    )
    try:
        return run.changed(changes, world_size)
    except ValidationError as error:
        raise_all(ConfigError, validation_problems(TrainingSections, error, "changes"))
        raise


def _is_known(path: str) -> bool:
    """Tell whether sections have a value of that path."""
    *parents, name = path.split(".")
    place: type[BaseModel] | None = TrainingSections
    for parent in parents:
        place = section_of(place, parent) if place is not None and parent in place.model_fields else None
    return place is not None and name in place.model_fields
