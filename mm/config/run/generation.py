"""A generation: what is generated, and how the model is cut over the processes."""

from __future__ import annotations

from mm.config.inference import InferenceModel
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, mesh_layout
from mm.config.model import WanConfig
from mm.config.run.mesh import MeshRun
from mm.config.run.parallel import MeshSection


class GenerationRun(MeshRun):
    """A generation.

    Attributes:
        config: encoders, transformer, sampler, prompts. parallel: how it is cut.
    """

    config: InferenceModel
    parallel: MeshSection = MeshSection()

    @property
    def mesh(self) -> MeshSection:
        """How it is cut."""
        return self.parallel

    @property
    def wan(self) -> WanConfig:
        """The transformer."""
        return self.config.predictor

    @property
    def dtype(self) -> str:
        """Of the parameters."""
        return self.config.predictor.dtype

    @property
    def zero(self) -> ZeroConfig | None:
        """Layer-zero's section, or None."""
        return self.parallel.layerzero

    @property
    def layout(self) -> Layout:
        """Of the processes, once the rules have accepted them."""
        return mesh_layout(self)
