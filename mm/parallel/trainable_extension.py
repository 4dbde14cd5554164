"""Training of parameters that are added to a model, whose own are frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mm.parallel.placement import Shape
from mm.wan.model import WanModel


@dataclass(frozen=True)
class TrainableExtension:
    """Modules that `mm.parallel.apply` adds to every stage before it gets memory.

    Attributes:
        prepare: freezes a stage of the model and adds what belongs to its blocks, in place. The stage lies on the meta
            device, in the dtypes it will have; what is added gets its final dtype here.
        shapes: whole shapes of everything that is added to the whole model, by native name.
        trained: whole shapes of those of them that are trained, in an order that all ranks share.
    """

    prepare: Callable[[WanModel], object]
    shapes: Mapping[str, Shape]
    trained: Mapping[str, Shape]
