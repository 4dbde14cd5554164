"""Demands on its processes by a command that runs a model; the input of the rules about them."""

from __future__ import annotations

import abc

from mm.config.model import WanConfig
from mm.config.run.base import Run
from mm.config.run.parallel import MeshSection


class MeshRun(Run):
    """A run of a model on processes."""

    @property
    @abc.abstractmethod
    def mesh(self) -> MeshSection:
        """Section of the mesh."""

    @property
    @abc.abstractmethod
    def wan(self) -> WanConfig:
        """The transformer."""

    @property
    @abc.abstractmethod
    def dtype(self) -> str:
        """Dtype of the parameters: bf16, fp16 or fp32; its path is `model.precision`."""

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self.mesh.tensor_size

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree."""
        return 1

    @property
    def cp(self) -> int:
        """Context-parallel degree."""
        return self.mesh.context_size

    @property
    def ulysses(self) -> int | None:
        """Ranks that exchange heads for tokens; None where the section does not say a degree that divides CP."""
        if self.mesh.context_algorithm == "ulysses":
            return self.cp
        if self.mesh.context_algorithm == "ring":
            return 1
        degree = self.mesh.ulysses_size
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
        heads = self.wan.num_heads
        return heads // self.tp if heads % self.tp == 0 else heads
