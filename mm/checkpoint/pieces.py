"""Pieces: boxes of global tensors together with their data in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm.checkpoint.boxes import Box, flat_range_to_boxes, whole


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor in this process: what to save, or where to load to.

    Attributes:
        key: the tensor's global name, `model.blocks.0.self_attn.q.weight`.
        global_shape: the shape of the whole tensor.
        box: which part of it this is.
        tensor: the part's data, of the shape `box.sizes`; loading writes into it, so it may be a view.
        any_dtype: loading may round what is stored in another dtype.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    any_dtype: bool = False

    def __post_init__(self) -> None:
        if tuple(self.tensor.shape) != self.box.sizes:
            raise ValueError(f"{self.key}: a tensor of shape {tuple(self.tensor.shape)} for the box {self.box}")


def whole_piece(key: str, tensor: torch.Tensor) -> Piece:
    """The piece that is a whole tensor."""
    return Piece(key, tuple(tensor.shape), whole(tensor.shape), tensor)


def pieces_of_flat_range(
    key: str,
    global_shape: Sequence[int],
    start: int,
    flat: torch.Tensor,
    outer: Box | None = None,
    *,
    any_dtype: bool = False,
) -> list[Piece]:
    """The pieces of elements [start, start + len(flat)) of a flattened tensor, as views of `flat` (1-D, contiguous).

    Args:
        key: the tensor's global name. global_shape: its whole shape.
        start: index of the first element, within `outer` flattened.
        flat: the elements.
        outer: the box of the whole tensor whose elements are counted, for a tensor-parallel rank's part; default: all.
        any_dtype: as of `Piece`.
    """
    shape = tuple(global_shape)
    outer = outer or whole(shape)
    pieces = []
    position = 0
    for box in flat_range_to_boxes(outer.sizes, start, start + flat.numel()):
        view = flat[position : position + box.numel].view(box.sizes)
        pieces.append(Piece(key, shape, box.moved(outer.offsets), view, any_dtype))
        position += box.numel
    return pieces
