"""Plan of a run's adapters: the linears that get one, the base model's precision, and the values all start with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mm.checkpoint.weights import WeightSource
from mm.config.model import WanConfig
from mm.config.run.checkpoint import AdapterSection
from mm.lora.layer import (
    Adapted,
    adapter_shapes,
    add_adapters,
    initial_adapter_value,
    is_adapter,
    keep_in_low_bits,
)
from mm.lora.low_bit import SCALE, LowBit, quantised
from mm.lora.targets import FLAG, SKIP_FLAG, Sizes, linears_of, target_linears, without_skipped
from mm.parallel.placement import Shape, whole_shapes
from mm.parallel.trainable_extension import TrainableExtension
from mm.wan.model import WanModel


@dataclass(frozen=True)
class LoRAPlan:
    """The adapters of a run.

    Attributes:
        linears: all that could have one, by native module name. adapted: those that do, and how.
        base_dtype: of the frozen weights of all of `linears`; None for the run's precision.
    """

    linears: Mapping[str, Sizes]
    adapted: Mapping[str, Adapted]
    base_dtype: LowBit | None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Whole shapes of what is trained, by native name."""
        return dict(adapter_shapes(self.linears, self.adapted))

    @property
    def parameters(self) -> int:
        """Elements that are trained."""
        return sum(map(math.prod, self.shapes.values()))

    def extension(self) -> TrainableExtension:
        """Extension that `mm.parallel.apply.apply` adds to a model."""
        scales = {f"{name}.{SCALE}": (rows,) for name, (rows, _) in self.linears.items()} if self.base_dtype else {}
        return TrainableExtension(self._prepare, {**scales, **self.shapes}, self.shapes)

    def _prepare(self, model: WanModel) -> None:
        if self.base_dtype is not None:
            keep_in_low_bits(model, self.linears, self.base_dtype)
        add_adapters(model, self.adapted)


def plan_of(
    adapters: AdapterSection | None, wan: WanConfig, word: str = FLAG, skip_word: str = SKIP_FLAG
) -> LoRAPlan | None:
    """The plan of a checked section; None where all parameters are trained.

    Args:
        adapters: the section. wan: the model. word: the user's, for the targets. skip_word: for what is left out.

    Raises:
        ConfigError: CFG-100 and CFG-101 for target words, CFG-427 for those that are left out.
    """
    if adapters is None:
        return None
    linears = linears_of(whole_shapes(wan))
    names = without_skipped(target_linears(adapters.targets, linears, word), adapters.skip, skip_word)
    return LoRAPlan(linears, dict.fromkeys(names, Adapted(adapters.rank, adapters.alpha)), adapters.base_dtype)


def starting_values(plan: LoRAPlan, base: WeightSource, seed: int) -> Callable[[str, Shape], Tensor]:
    """(native name, whole shape) -> what a parameter of the adapted model starts with, for `apply`.

    Args:
        plan: the adapters. base: checked weights of the base model. seed: of new adapters.
    """
    stored = base.read if plan.base_dtype is None else quantised(base.read, plan.linears, plan.base_dtype)

    def value_of(name: str, shape: Shape) -> Tensor:
        if is_adapter(name):
            return initial_adapter_value(name, shape, seed)
        return stored(name)

    return value_of
