"""A training run: every section, the processes it is for, and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from mm.config.base import Section
from mm.config.diffusion import DiffusionConfig
from mm.config.model import WanConfig
from mm.config.run.around import (
    EvaluationSection,
    LoggingSection,
    SupervisionSection,
    TrainingSection,
    ValidationSection,
)
from mm.config.run.checkpoint import AdapterSection, CheckpointSection
from mm.config.run.data import DataSection
from mm.config.run.memory import MemorySection
from mm.config.run.mesh import MeshRun
from mm.config.run.model import ModelSection
from mm.config.run.optimizer import OptimizerSection
from mm.config.run.origins import Origins
from mm.config.run.parallel import ParallelSection
from mm.errors import Problem


class TrainingSections(Section):
    """All that describes a training run, and all that run.yaml holds."""

    training: TrainingSection
    model: ModelSection
    data: DataSection
    objective: DiffusionConfig = DiffusionConfig()
    optimizer: OptimizerSection
    parallel: ParallelSection = ParallelSection()
    memory: MemorySection = MemorySection()
    adapters: AdapterSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection | None = None
    validation: ValidationSection | None = None
    supervision: SupervisionSection = SupervisionSection()
    logging: LoggingSection = LoggingSection()


class TrainingRun(TrainingSections, MeshRun):
    """A training run.

    Attributes:
        problems: what the user's words say that sections cannot hold, such as one value said twice and differently;
            a run that has any is only looked at by the rules.
        notes: what the user's files say that is how it is done here anyway, as lines for the log.
    """

    problems: tuple[Problem, ...] = Field((), exclude=True, repr=False)
    notes: tuple[str, ...] = Field((), exclude=True, repr=False)

    @property
    def mesh(self) -> ParallelSection:
        """How it is cut."""
        return self.parallel

    @property
    def wan(self) -> WanConfig:
        """The transformer."""
        return self.model.shape

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        return self.model.precision

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree."""
        return self.parallel.pipeline_size

    @property
    def vp(self) -> int:
        """Model chunks of one pipeline rank."""
        return self.parallel.virtual_size

    @property
    def blocks_of_stages(self) -> list[int]:
        """Blocks of the virtual stages as `parallel.stages` lists them; one number where all have as many."""
        if self.pp == 1 or not any(self.parallel.stages or ()):
            return [self.wan.num_layers // (self.pp * self.vp if self.pp > 1 else 1)]
        return [number for row in self.parallel.stages or () for number in row]

    def samples_of_step(self, dp_size: int) -> int:
        """The global batch, of all `dp_size` replicas."""
        return self.data.global_batch_size or self.data.micro_batch_size * dp_size

    def micro_batches_of_step(self, dp_size: int) -> int:
        """Forwards of one replica in one step."""
        return self.samples_of_step(dp_size) // (self.data.micro_batch_size * dp_size)

    def word(self, path: str) -> str:
        """What the user wrote a value with, or would: `--lr`, `predictor.num_heads in m.json`."""
        return self.origins[path].full()

    def values(self) -> dict[str, Any]:
        """Every value by its path; that of a section that may be left out is True or None."""
        return dict(_leaves(TrainingSections, written(self)))

    def changed(self, values: Mapping[str, Any], world_size: int | None = None) -> TrainingRun:
        """The run with other values, by path; a section that was not there begins with its defaults.

        Raises:
            pydantic.ValidationError: for values that the sections do not take.
        """
        sections = written(self)
        for path, value in values.items():
            *parents, name = path.split(".")
            place = sections
            for parent in parents:
                if place[parent] is None:
                    place[parent] = {}
                place = place[parent]
            place[name] = value
        checked = TrainingSections.model_validate_json(json.dumps(sections))
        return training_run(checked, self.origins, world_size or self.world_size)


def training_run(
    sections: TrainingSections,
    origins: Origins,
    world_size: int = 1,
    problems: Sequence[Problem] = (),
    notes: Sequence[str] = (),
) -> TrainingRun:
    """The run that checked sections describe, on so many processes."""
    values = {name: getattr(sections, name) for name in TrainingSections.model_fields}
    return TrainingRun(**values, origins=origins, world_size=world_size, problems=tuple(problems), notes=tuple(notes))


def written(section: BaseModel) -> dict[str, Any]:
    """The values of sections as a file holds them: plain, all defaults filled in, nothing that has no effect."""
    values: dict[str, Any] = section.model_dump(mode="json")
    objective = values.get("objective")
    if objective is not None and objective["timestep_sampling"] != "logit_normal":
        del objective["logit_mean"], objective["logit_std"]  # refused where they have no effect
    return values


def _leaves(section: type[BaseModel], values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        inner = section_of(section, name)
        if inner is not None and value is not None:
            if not isinstance(section.model_fields[name].annotation, type):
                yield f"{path}{name}", True
            yield from _leaves(inner, value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def section_of(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a field holds, or None where it holds a value."""
    annotation = section.model_fields[name].annotation
    options = (annotation, *getattr(annotation, "__args__", ()))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)
