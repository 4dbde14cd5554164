"""Place of a rank's parameter in the whole one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from mm.parallel.tensor import sharded_dim
from mm.wan.model import whole_shapes

__all__ = ["Placement", "Shape", "local", "place", "whole_shapes"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """The box of a whole parameter that tensor parallelism gives to a rank.

    Attributes:
        global_shape: of the whole parameter. shape: of the rank's part. offsets: of the part's first element.
        sharded: whether the part is less than the whole by design, so that every tensor-parallel rank has another.
    """

    global_shape: Shape
    shape: Shape
    offsets: Shape
    sharded: bool

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of a whole tensor, as a view."""
        return whole[tuple(slice(start, start + size) for start, size in zip(self.offsets, self.shape, strict=True))]


def place(name: str, global_shape: Shape, tp_rank: int, tp_size: int) -> Placement:
    """The part of the parameter of this native name that a tensor-parallel rank holds."""
    dim = sharded_dim(name) if tp_size > 1 else None
    if dim is None:
        return Placement(global_shape, global_shape, (0,) * len(global_shape), False)
    shape, offsets = list(global_shape), [0] * len(global_shape)
    shape[dim] //= tp_size
    offsets[dim] = tp_rank * shape[dim]
    return Placement(global_shape, tuple(shape), tuple(offsets), True)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank keeps: layer-zero's tensors are distributed ones."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
