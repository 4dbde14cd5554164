"""Training of some parameters, added to a model or its own, while the others are frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mm.parallel.placement import Shape
from mm.wan.model import WanModel


@dataclass(frozen=True)
class TrainableExtension:
    """Choice of what `mm.parallel.apply` trains, with the modules that it adds to every stage before it gets memory.

    Attributes:
        prepare: freezes a stage of the model but for what is trained of it, and adds what belongs to its blocks, in
            place. The stage lies on the meta device, in the dtypes it will have; what is added gets its final dtype
            here.
        shapes: whole shapes of everything that is added to the whole model, by native name.
        trained: whole shapes of everything that is trained, in an order that all ranks share.
        lr_scales: factors of the learning rate by name, of those that have another than 1.
    """

    prepare: Callable[[WanModel], object]
    shapes: Mapping[str, Shape]
    trained: Mapping[str, Shape]
    lr_scales: Mapping[str, float] = field(default_factory=dict)
