"""Parameters of a parallel model that no step changes: what of each this rank holds, and who answers for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

from mm.parallel.apply import ParallelModel
from mm.parallel.layerzero import local_rows
from mm.parallel.placement import Placement


@dataclass(frozen=True)
class FrozenShard:
    """The part of one frozen parameter that this rank holds.

    Attributes:
        name: native Wan name.
        placement: where this rank's parameter lies in the whole one.
        start: of the part in that parameter, flattened. values: the part itself, flat, in the model's dtype.
        owned: whether this rank answers for it; the same part on other ranks is a copy.
    """

    name: str
    placement: Placement
    start: int
    values: Tensor
    owned: bool

    def fill(self, whole: Tensor) -> None:
        """Set the part, given the whole parameter."""
        part = self.placement.of(whole).reshape(-1)
        self.values.copy_(part[self.start : self.start + len(self.values)])


def frozen_shards(parallel: ParallelModel) -> Iterator[FrozenShard]:
    """Every frozen parameter's part that this rank holds, in the model's order."""
    mesh = parallel.mesh
    for name, parameter in parallel.all_parameters().items():
        if parameter.requires_grad:
            continue
        placement = parallel.placements[name]
        local, row = local_rows(parameter)
        copies = mesh.dp_cp_rank
        if isinstance(parameter, DTensor) and mesh.zero is not None:
            copies = mesh.zero["replicate"].get_local_rank()
        owned = copies == 0 and (placement.sharded or mesh.tp_rank == 0)
        yield FrozenShard(name, placement, row * math.prod(placement.shape[1:]), local.view(-1), owned)
