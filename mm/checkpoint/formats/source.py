"""Source of weights, as every format offers it: tensors of one transformer under native names, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor, dtype

from mm.config.model import WanConfig


class TensorKind(NamedTuple):
    """Shape and dtype of a tensor that is on disk."""

    shape: tuple[int, ...]
    dtype: dtype


class WeightSource(Protocol):
    """The weights of one Wan transformer in some format. Names are native; a name no convention knows is kept."""

    @property
    def path(self) -> Path:
        """Place of the weights."""

    @property
    def label(self) -> str:
        """The format, for messages."""

    def kinds(self) -> dict[str, TensorKind]:
        """Shape and dtype of every tensor, without reading any."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor as stored, on the CPU; it may be a view of the mapped file. KeyError when it is not there."""

    def config(self) -> WanConfig | None:
        """The model's shape where the format stores it."""
