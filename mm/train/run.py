"""Parts of one training run: its configuration, its data, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mm.checkpoint.comm import Comm
from mm.checkpoint.lock import DEFAULT_TIMES
from mm.checkpoint.mismatch import Expected
from mm.config.model import WanConfig
from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun
from mm.data.dataset import FeatureDataset
from mm.device.backend import Backend
from mm.parallel.apply import DataParallelOptions
from mm.parallel.mesh import Mesh
from mm.stopping import StopRequest
from mm.supervise.limits import LAST_SAVE, OPENING, PREPARING, SAVE_BEFORE, Limits
from mm.supervise.watchdog import Watchdog
from mm.train.trained_parts import TrainedModel

if TYPE_CHECKING:  # the encoders' libraries
    from mm.extract.live.opening import LiveStores


@dataclass(frozen=True)
class Run:
    """Everything one training run is made of.

    Attributes:
        sections: checked configuration. dataset: the features that it names.
        mesh, backend: where it runs. comm: the ranks, for checkpoints.
        processes_of_node: this rank's node and its memory are shared by so many.
        trained: what is trained of the model.
        saving: the ranks over a group of their own, for saves in the background; None saves in the loop.
        watch: over this process. stop: notes signals; None where they end the process.
        held_out: the features of its evaluation, or None. validation: what is rendered meanwhile, or None.
        live: the stores among `dataset` whose features this run makes, or None.
        beside: of one expert's run the folders of the other ones' checkpoints, which are of the same steps.
    """

    sections: TrainingRun
    dataset: FeatureDataset
    mesh: Mesh
    backend: Backend
    comm: Comm
    watch: Watchdog
    stop: StopRequest | None = None
    processes_of_node: int = 1
    trained: TrainedModel = field(default_factory=TrainedModel)
    saving: Comm | None = None
    held_out: FeatureDataset | None = None
    validation: GenerationRun | None = None
    live: LiveStores | None = None
    beside: tuple[Path, ...] = ()

    @property
    def global_batch_size(self) -> int:
        """Samples in one step."""
        return self.sections.samples_of_step(self.mesh.layout.dp_size)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one replica in one step; where samples are packed, the most that there can be."""
        return self.sections.micro_batches_of_step(self.mesh.layout.dp_size)

    @property
    def config(self) -> WanConfig:
        """The model's shape."""
        return self.sections.wan

    @property
    def is_asked_to_stop(self) -> bool:
        """True once a signal has reached this process."""
        return self.stop is not None and self.stop.received is not None

    @property
    def reports(self) -> bool:
        """True on the rank that writes metrics and logs."""
        return self.comm.rank == 0


def data_parallel_options(sections: TrainingRun) -> DataParallelOptions:
    """Options of data parallelism, from the sections."""
    cut = sections.parallel
    return DataParallelOptions(cut.distributed_optimizer, cut.overlap_grad_reduce, cut.overlap_param_gather)


def expected_model(sections: TrainingRun) -> Expected:
    """The model that weights to start from must be of; others are CFG-028."""
    return Expected(sections.wan, lambda name: sections.origins[f"model.shape.{name}"], "CFG-028")


def watch_limits(sections: TrainingRun) -> Limits:
    """Limits of the watch; where what a phase waits for has a limit of its own, longer than that."""
    ceiling = 0.9 * 60 * sections.supervision.timeout_minutes
    patience = {
        OPENING: 2 * DEFAULT_TIMES.stale_s,
        SAVE_BEFORE: ceiling,
        LAST_SAVE: float("inf"),
        PREPARING: float("inf"),
    }
    hang_timeout, data = sections.supervision.hang_timeout, sections.data
    if hang_timeout is None and (data.workers > 0 or sections.live is not None):
        patience["waiting for data"] = data.read_timeout + 60
    return Limits(hang_timeout, ceiling, patience)


def training_dtype(sections: TrainingRun) -> torch.dtype:
    """Dtype of the bulk of the parameters and of activations."""
    return torch.bfloat16 if sections.model.precision == "bf16" else torch.float32
