"""A transformer whose weights are released in two parts: a model, and one module of it alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mm.checkpoint.formats.found import Found
from mm.checkpoint.formats.source import TensorKind, WeightSource
from mm.checkpoint.safetensor_file import DTYPES
from mm.config.model import WanConfig
from mm.wan.config_json import infer_config

MOTION_CONTROLLER = "motion_controller"
_MODULES = {
    MOTION_CONTROLLER: frozenset(f"linear.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))
}
"""Modules that are released alone, with the names of their tensors."""


def module_of(found: Found) -> str | None:
    """The module that a file holds and nothing else, or None."""
    names = {name for header in found.headers.values() for name in header}
    return next((module for module, expected in _MODULES.items() if names == expected), None)


@dataclass(frozen=True)
class WithModule:
    """`WeightSource` over a model and a module that it is given.

    Attributes:
        base: the model. module: the name of the module in it. part: what `module_of` knows.
    """

    base: WeightSource
    module: str
    part: Found

    @property
    def path(self) -> Path:
        """Path of the base."""
        return self.base.path

    @property
    def label(self) -> str:
        """The format of the base."""
        return f"{self.base.label} with {self.module}"

    def kinds(self) -> dict[str, TensorKind]:
        """Those of both."""
        of_part = {
            f"{self.module}.{name}": TensorKind(info.shape, DTYPES[info.dtype])
            for header in self.part.headers.values()
            for name, info in header.items()
        }
        return {**self.base.kinds(), **of_part}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of both."""
        return {name: kind.shape for name, kind in self.kinds().items()}

    def read(self, name: str) -> Tensor:
        """One tensor as stored. KeyError when neither has it."""
        own = name.removeprefix(f"{self.module}.")
        if own == name:
            return self.base.read(name)
        file = next((file for file, header in self.part.headers.items() if own in header), None)
        if file is None:
            raise KeyError(name)
        with safe_open(file, framework="pt") as opened:
            value: Tensor = opened.get_tensor(own)
        return value

    def config(self) -> WanConfig | None:
        """The shapes of both tell it; what shapes do not show is the base's."""
        base = self.base.config()
        return None if base is None else infer_config(self.shapes(), self.path, base.head_dim)
