"""Reading a folder (or one file) of safetensors in diffusers, native or MindSpeed-MM names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mm.checkpoint.formats.source import TensorKind
from mm.checkpoint.safetensor_file import DTYPES
from mm.config.model import WanConfig
from mm.wan.folder import WeightFolder


@dataclass(frozen=True)
class FolderWeights:
    """`WeightSource` over a checked `WeightFolder`."""

    folder: WeightFolder

    @property
    def path(self) -> Path:
        """The folder or file."""
        return self.folder.path

    @property
    def label(self) -> str:
        """The convention of the names in it."""
        return f"{self.folder.convention} weights"

    def kinds(self) -> dict[str, TensorKind]:
        """From the headers; what is multiplied by a scale is fp32."""
        stored, scales = self.folder.stored, self.folder.scales
        return {
            name: TensorKind(shape, torch.float32 if name in scales else DTYPES[stored[name].dtype])
            for name, shape in self.folder.shapes().items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """From the headers."""
        return self.folder.shapes()

    def read(self, name: str) -> Tensor:
        """A view of the mapped file, or a product."""
        return self.folder.tensor(name)

    def config(self) -> WanConfig:
        """From config.json, else inferred from the shapes with a warning; raises what `WeightFolder.config` raises."""
        return self.folder.config()
