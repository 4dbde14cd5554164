"""Reading a folder (or one file) of safetensors in diffusers, native or MindSpeed-MM names.

A folder may also hold an adapter under the name that its tool looks for; asked for an adapter, that file is meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mm.checkpoint.formats.contents import content_of
from mm.checkpoint.formats.found import Found, Wanted
from mm.checkpoint.formats.source import TensorKind
from mm.checkpoint.safetensor_file import DTYPES
from mm.config.model import WanConfig
from mm.wan.folder import WeightFolder
from mm.wan.shards import Header, find_shards, read_header, require_all_shards

FORMAT = "safetensors"
PEFT_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""
PEFT_MODEL_FILE = "adapter_model.safetensors"
"""The name under which PEFT writes an adapter."""


@dataclass(frozen=True)
class FolderWeights:
    """`WeightSource` over a checked `WeightFolder`."""

    folder: WeightFolder

    @classmethod
    def open(cls, found: Found) -> FolderWeights:
        """Open what `recognise` found; no file is.

        Raises:
            DataError: DATA-029 to DATA-031 as `WeightFolder.open`.
        """
        return cls(WeightFolder.of(found.path, found.headers))

    @property
    def path(self) -> Path:
        """The folder or file."""
        return self.folder.path

    @property
    def label(self) -> str:
        """The convention of the names in it."""
        return f"{self.folder.convention} weights"

    def kinds(self) -> dict[str, TensorKind]:
        """Kinds by the headers; what is multiplied by a scale is fp32."""
        stored, scales = self.folder.stored, self.folder.scales
        return {
            name: TensorKind(shape, torch.float32 if name in scales else DTYPES[stored[name].dtype])
            for name, shape in self.folder.shapes().items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by the headers."""
        return self.folder.shapes()

    def read(self, name: str) -> Tensor:
        """A view of the mapped file, or a product."""
        return self.folder.tensor(name)

    def config(self) -> WanConfig:
        """Configuration by config.json, else by the shapes with a warning; raises what `WeightFolder.config` raises."""
        return self.folder.config()


def recognise(path: Path, wanted: Wanted = "model") -> Found | None:
    """One safetensors file, or those of a folder; their headers are read and checked.

    Args:
        path: the file or folder.
        wanted: which of the two is meant in a folder that has both a model and an adapter under its tool's name.

    Raises:
        DataError: DATA-022 for a damaged file, DATA-023 to DATA-025 for shards and their index.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return _found(path, find_shards(path))
    if not any(path.glob("*.safetensors*")):
        return None
    adapter = next((path / name for name in (PEFT_FILE, PEFT_MODEL_FILE) if (path / name).exists()), None)
    if adapter is not None and wanted == "adapters":
        return _found(path, {adapter: read_header(adapter)})
    found = _found(path, find_shards(path))
    if adapter is not None and adapter in found.headers and found.content == "adapters":  # copies for several tools
        return _found(path, {adapter: found.headers[adapter]})
    return found


def of_files(files: Sequence[Path]) -> Found:
    """Several safetensors files of one model, in one folder; which belong together is for the caller to know.

    Raises:
        DataError: DATA-022 for a damaged file, DATA-024 for a shard that the names of the others count.
    """
    require_all_shards(files)
    return _found(files[0].parent, {file: read_header(file) for file in files})


def _found(path: Path, headers: dict[Path, Header]) -> Found:
    content, names = content_of([name for header in headers.values() for name in header])
    return Found(path, FORMAT, path, content, names, headers=headers)
