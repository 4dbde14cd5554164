"""A transformer whose weights are in two files: a model, and one part of it that is released or was trained alone."""

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

MOTION_CONTROLLER, SIDE_BLOCKS = "motion_controller", "vace_blocks"
_CONTROLLER = frozenset(f"linear.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias"))
_SIDE = ("vace_blocks.", "vace_patch_embedding.")


def module_of(found: Found) -> str | None:
    """The part that a file holds and nothing else, or None."""
    names = {name for header in found.headers.values() for name in header}
    if names == _CONTROLLER:
        return MOTION_CONTROLLER
    return SIDE_BLOCKS if names and all(name.startswith(_SIDE) for name in names) else None


@dataclass(frozen=True)
class WithModule:
    """`WeightSource` over a model and a module that it is given.

    Attributes:
        base: the model, with other values of the part or without it. module, part: as `module_of` has them.
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
            self._native(name): TensorKind(info.shape, DTYPES[info.dtype])
            for header in self.part.headers.values()
            for name, info in header.items()
        }
        return {**self.base.kinds(), **of_part}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of both."""
        return {name: kind.shape for name, kind in self.kinds().items()}

    def read(self, name: str) -> Tensor:
        """One tensor as stored. KeyError when neither has it."""
        for file, header in self.part.headers.items():
            own = next((one for one in header if self._native(one) == name), None)
            if own is not None:
                with safe_open(file, framework="pt") as opened:
                    value: Tensor = opened.get_tensor(own)
                return value
        return self.base.read(name)

    def _native(self, name: str) -> str:
        """Native name of a tensor of the part."""
        return f"{self.module}.{name}" if self.module == MOTION_CONTROLLER else name

    @property
    def left_over(self) -> list[str]:
        """Parameters of the part that the base has and the file has not: it is of another model."""
        starts = _SIDE if self.module == SIDE_BLOCKS else (f"{self.module}.",)
        there = {self._native(name) for header in self.part.headers.values() for name in header}
        return [name for name in self.base.kinds() if name.startswith(starts) and name not in there]

    def config(self) -> WanConfig | None:
        """The shapes of both tell it; what shapes do not show is the base's."""
        base = self.base.config()
        return None if base is None else infer_config(self.shapes(), self.path, base.head_dim)
