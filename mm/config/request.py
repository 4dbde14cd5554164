"""What a user asks for, unchecked: the flags, the files and the processes started. Every rule reads one."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from mm.config.layerzero import ZeroConfig
from mm.config.mesh import MeshFlags
from mm.config.model import WanConfig
from mm.config.train import PretrainModel, TrainFlags


class MeshRequest(abc.ABC):
    """What a command that runs a model asks of the processes; the input of the rules about them.

    Attributes:
        zero: zero_config.yaml, where layer-zero is asked for.
        world_size: the processes that were started.
    """

    zero: ZeroConfig | None
    world_size: int

    @property
    @abc.abstractmethod
    def mesh_flags(self) -> MeshFlags:
        """The flags about the processes."""

    @property
    @abc.abstractmethod
    def shape(self) -> WanConfig:
        """The transformer."""

    @property
    @abc.abstractmethod
    def dtype(self) -> tuple[str, str]:
        """Of the parameters: bf16, fp16 or fp32, and how the user said so."""

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.mesh_flags.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree."""
        return 1

    @property
    def cp(self) -> int:
        """Context-parallel degree."""
        return self.mesh_flags.context_parallel_size

    @property
    def ulysses(self) -> int | None:
        """Ranks that exchange heads for tokens; None where the flags do not say a degree that divides CP."""
        if self.mesh_flags.context_parallel_algo == "ulysses_cp_algo":
            return self.cp
        if self.mesh_flags.context_parallel_algo == "megatron_cp_algo":
            return 1
        degree = self.mesh_flags.ulysses_degree_in_cp
        return degree if degree is not None and self.cp % degree == 0 else None

    @property
    def replica(self) -> int:
        """Processes of one data-parallel replica."""
        return self.tp * self.pp * self.cp

    @property
    def dp(self) -> int | None:
        """Data-parallel replicas; None where the processes do not divide by TP x PP x CP."""
        return None if self.world_size % self.replica else self.world_size // self.replica

    @property
    def heads(self) -> int:
        """Heads of one tensor-parallel rank; all of them where they do not divide, which CFG-033 tells."""
        heads = self.shape.num_heads
        return heads // self.tp if heads % self.tp == 0 else heads


@dataclass(frozen=True)
class Request(MeshRequest):
    """What is asked of a training run.

    Attributes:
        flags, model: command line and pretrain_model.json.
        zero: zero_config.yaml, where layer-zero is asked for.
        world_size: the processes that were started.
    """

    flags: TrainFlags
    model: PretrainModel
    zero: ZeroConfig | None
    world_size: int

    @property
    def mesh_flags(self) -> MeshFlags:
        """All of them."""
        return self.flags

    @property
    def shape(self) -> WanConfig:
        """The transformer."""
        return self.model.predictor

    @property
    def dtype(self) -> tuple[str, str]:
        """Of the parameters, and how the user said so."""
        return ("bf16", "--bf16 is given") if self.flags.bf16 else ("fp32", "--bf16 is absent")

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree."""
        return self.flags.pipeline_model_parallel_size

    @property
    def vp(self) -> int:
        """Model chunks of one pipeline rank."""
        return self.flags.virtual_pipeline_model_parallel_size or 1

    @property
    def blocks_of_stages(self) -> list[int]:
        """Blocks of the virtual stages as pipeline_num_layers lists them; one number where all have as many."""
        listed = self.model.predictor.pipeline_num_layers
        if self.pp == 1 or not listed:
            return [self.model.predictor.num_layers // (self.pp * self.vp if self.pp > 1 else 1)]
        return [number for row in listed for number in (row if isinstance(row, list) else [row])]
