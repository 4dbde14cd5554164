"""Two transformers that share the noise levels, such as Wan2.2's A14B models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from mm.api.model import Placing, opened
from mm.config.model import Precision, WanConfig
from mm.config.run.experts import HIGH, LOW
from mm.config.run.residency import Residency
from mm.config.tasks.registry import TaskName
from mm.device.backend import DeviceKind
from mm.errors import ConfigError
from mm.generate.experts import TwoExperts, boundary_between, require_experts_in_place
from mm.parallel.velocity import ParallelVelocity
from mm.wan.model import WanModel

AnyModel: TypeAlias = WanModel | ParallelVelocity
Adapters: TypeAlias = Iterable[str | Path | tuple[str | Path, float]]


@dataclass(frozen=True)
class Experts:
    """Two transformers of one shape, of which each noise level has one.

    Attributes:
        high: the one at noise levels from `boundary` on. low: the one below it.
        boundary: noise level; 0.875 of Wan2.2's T2V-A14B, 0.9 of I2V-A14B.
    """

    high: AnyModel
    low: AnyModel
    boundary: float

    def __post_init__(self) -> None:
        """Raise ConfigError, CFG-200, for models of two shapes or a boundary that is no noise level."""
        if self.high.config != self.low.config:
            titles = " and ".join(model.config.task.title for model in (self.high, self.low))
            found = f"The experts are models of two shapes ({titles})."
            raise ConfigError("CFG-200", found, "Load both experts of one model.")
        if not 0 < self.boundary < 1:
            raise ConfigError("CFG-200", f"boundary is {self.boundary}.", "Give a number above 0 and below 1.")

    @property
    def config(self) -> WanConfig:
        """Shape of each of them."""
        return self.high.config

    @property
    def velocity(self) -> TwoExperts:
        """Both, called as one transformer is."""
        return TwoExperts(self.high, self.low, self.boundary)


def load_experts(
    high: str | Path,
    low: str | Path | None = None,
    *,
    boundary: float | None = None,
    dtype: Precision = "bf16",
    device: DeviceKind | None = None,
    task: TaskName | None = None,
    adapters: Adapters = (),
    low_adapters: Adapters = (),
    text_len: int | None = None,
    residency: Residency | None = None,
    clip: tuple[int, int, int] | None = None,
    batch_size: int = 1,
) -> Experts:
    """Load two experts for `generate_videos`.

    Args:
        high: the expert for much noise, as for `load_model`, or a folder with `transformer` and `transformer_2`, as
            diffusers' models and checkpoints of runs that trained both have them.
        low: the expert for little noise; None takes `transformer_2` of that folder.
        boundary: noise level from which on `high` is asked; None takes what is recorded beside the weights.
        adapters, low_adapters: LoRA of each of them.
        dtype, device, task, text_len, clip, batch_size: as for `load_model`.
        residency: as for `load_model`; the experts share its limits.

    Raises:
        ConfigError: CFG-200 for a folder without two experts and for experts of two shapes, CFG-294 where nothing says
            the boundary, CFG-295 for experts in each other's place; what `load_model` raises.
        CheckpointError, DataError: what `load_model` raises.
    """
    if low is None:
        high, low = folders_of_experts(Path(high))
    how = Placing(dtype, device, residency or Residency(), clip, batch_size)
    how.check()
    much, shape = opened(high, adapters, how, task, text_len)
    little, other = opened(low, low_adapters, how, task, text_len)
    between = boundary_between(boundary, little.source.path, "boundary=")
    require_experts_in_place(much.places, little.places, between)
    if shape != other:
        found = f"{high} is a {shape.task.title} model, and {low} one of another shape ({other.task.title})."
        raise ConfigError("CFG-200", found, "Name both experts of one model.")
    room = how.room(transformers=2)  # before the first of them takes its part
    return Experts(how.place(much, shape, room), how.place(little, other, room), between)


def has_two_experts(folder: Path) -> bool:
    """Tell whether a folder has a transformer for much noise and one for little."""
    return (folder / HIGH).is_dir() and (folder / LOW).is_dir()


def folders_of_experts(folder: Path) -> tuple[Path, Path]:
    """Folders of the experts in a folder, that for much noise first.

    Raises:
        ConfigError: CFG-200 where there are no two.
    """
    if not has_two_experts(folder):
        found = f"{folder} has no {HIGH} and {LOW}."
        raise ConfigError("CFG-200", found, "Give low= beside it, or use load_model for a single transformer.")
    return folder / HIGH, folder / LOW


def device_of_model(model: AnyModel | Experts) -> torch.device:
    """The device that a model computes on."""
    first = model.high if isinstance(model, Experts) else model
    return first.device if isinstance(first, ParallelVelocity) else next(first.parameters()).device
