"""A training run: every section, the processes it is for, and where each value came from."""

from __future__ import annotations

from typing import ClassVar

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
from mm.config.run.experts import ExpertsSection
from mm.config.run.live import LiveSection
from mm.config.run.memory import MemorySection
from mm.config.run.mesh import MeshRun
from mm.config.run.model import ModelSection
from mm.config.run.optimizer import OptimizerSection
from mm.config.run.parallel import ParallelSection


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
    experts: ExpertsSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection | None = None
    validation: ValidationSection | None = None
    live: LiveSection | None = None
    supervision: SupervisionSection = SupervisionSection()
    logging: LoggingSection = LoggingSection()


class TrainingRun(TrainingSections, MeshRun):
    """A training run."""

    sections: ClassVar = TrainingSections

    @property
    def mesh(self) -> ParallelSection:
        """Section of the mesh."""
        return self.parallel

    @property
    def wan(self) -> WanConfig:
        """The transformer."""
        return self.model.shape

    @property
    def dtype(self) -> str:
        """Dtype of the parameters."""
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
        """Forwards of one replica in one step; where samples are packed, the most that there can be."""
        return self.samples_of_step(dp_size) // (self.data.micro_batch_size * dp_size)
