"""Rectangular parts of tensors: pure arithmetic, no tensors and no files.

A sharded checkpoint is a set of boxes of global tensors. Tensor and pipeline parallelism cut boxes by nature; the
distributed optimizer owns ranges of the flattened tensor, which are a few boxes each (`flat_range_to_boxes`). Loading
into another layout is the intersection of the boxes on disk with the boxes in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a global N-d tensor.

    Attributes:
        offsets: index of the first element along each dim.
        sizes: number of elements along each dim. Both are empty for the only box of a 0-d tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index along each dim."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes this box out of its global tensor."""
        return tuple(slice(start, end) for start, end in zip(self.offsets, self.ends, strict=True))

    def within(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`, which must contain it."""
        return Box(tuple(mine - base for mine, base in zip(self.offsets, outer.offsets, strict=True)), self.sizes)

    def moved(self, offsets: tuple[int, ...]) -> Box:
        """This box of a part that begins at `offsets`, in the coordinates of the whole: the inverse of `within`."""
        return Box(tuple(mine + base for mine, base in zip(self.offsets, offsets, strict=True)), self.sizes)

    def __str__(self) -> str:
        return "[" + ",".join(f"{start}:{end}" for start, end in zip(self.offsets, self.ends, strict=True)) + "]"


def whole(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut elements [start, stop) of the flattened (C-order) tensor into the fewest boxes that lie contiguously in it.

    The boxes come in flat order, so that consecutive views of a flat shard are their data: a ragged first row, whole
    rows, a ragged last row, and the same again inside the ragged rows (at most 2 N - 1 boxes for N dims).

    Raises:
        ValueError: the range does not lie inside the tensor.
    """
    shape = tuple(shape)
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"range [{start}, {stop}) does not lie inside a tensor of shape {shape}")
    return [Box(*pair) for pair in _cut(shape, start, stop)] if start < stop else []


def intersect(first: Box, second: Box) -> Box | None:
    """The box common to both, or None when they share no element."""
    starts = tuple(map(max, first.offsets, second.offsets))
    ends = tuple(map(min, first.ends, second.ends))
    sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
    return Box(starts, sizes) if all(size > 0 for size in sizes) else None


def covers_exactly_once(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Check that every element of the tensor lies in exactly one box.

    Disjoint boxes inside the tensor cover it exactly when their volumes add up to its own. Disjointness is checked by a
    sweep along the dim with the most distinct offsets, so that shards along any one dim cost n log n.

    Returns:
        None when they do, else what is wrong.
    """
    outer = whole(shape)
    for box in boxes:
        if len(box.offsets) != len(outer.sizes) or min((*box.offsets, *box.sizes), default=0) < 0:
            return f"box {box} is no part of a tensor of shape {tuple(shape)}"
        if any(end > size for end, size in zip(box.ends, outer.sizes, strict=True)):
            return f"box {box} reaches outside a tensor of shape {tuple(shape)}"
    boxes = [box for box in boxes if box.numel]
    overlap = _first_overlap(boxes)
    if overlap is not None:
        return f"boxes {overlap[0]} and {overlap[1]} overlap"
    covered = sum(box.numel for box in boxes)
    if covered != outer.numel:
        return f"{outer.numel - covered} of {outer.numel} elements are in no box"
    return None


def _cut(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """`flat_range_to_boxes` as (offsets, sizes) pairs; start < stop."""
    if not shape:
        return [((), ())]
    inner = prod(shape[1:])
    first_row, head = divmod(start, inner)
    last_row, tail = divmod(stop, inner)
    if first_row == last_row:
        return _in_row(first_row, _cut(shape[1:], head, tail))
    result = []
    if head:
        result += _in_row(first_row, _cut(shape[1:], head, inner))
        first_row += 1
    if first_row < last_row:
        zeros = (0,) * (len(shape) - 1)
        result.append(((first_row, *zeros), (last_row - first_row, *shape[1:])))
    if tail:
        result += _in_row(last_row, _cut(shape[1:], 0, tail))
    return result


def _in_row(
    row: int, parts: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in parts]


def _first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    if len(boxes) < 2:
        return None
    num_dims = len(boxes[0].offsets)
    if num_dims == 0:
        return boxes[0], boxes[1]
    dim = max(range(num_dims), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offsets[dim]):
        active = [other for other in active if other.ends[dim] > box.offsets[dim]]
        for other in active:
            if intersect(box, other) is not None:
                return other, box
        active.append(box)
    return None
