"""Pieces of a training checkpoint: of what is trained, of what an optimizer keeps of it, and of what is frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mm.checkpoint.background import copy_bytes
from mm.checkpoint.boxes import Box
from mm.checkpoint.formats.training import AVERAGE_PREFIX, MODEL_PREFIX
from mm.checkpoint.store import Piece, pieces_of_flat_range
from mm.optim.ema import Average
from mm.optim.optimizer import Optimizer, ParamShard
from mm.parallel.frozen import FrozenShard


def frozen_pieces(shards: Sequence[FrozenShard]) -> list[Piece]:
    """Pieces of what is frozen, which a run in another precision may have rounded."""
    return [
        piece
        for shard in shards
        for piece in pieces_of_flat_range(
            f"{MODEL_PREFIX}{shard.name}",
            shard.placement.global_shape,
            shard.start,
            shard.values,
            Box(shard.placement.offsets, shard.placement.shape),
            any_dtype=True,
        )
    ]


def pieces_of(shards: Sequence[ParamShard], with_optimizer: bool, average: Average | None) -> list[Piece]:
    """Pieces of what is trained; where they are asked for, of what the optimizer keeps of it and of its average."""
    return [piece for shard in shards for piece in _parts_of(shard, with_optimizer, average)]


def _parts_of(shard: ParamShard, with_optimizer: bool, average: Average | None) -> Iterator[Piece]:
    values = {f"{MODEL_PREFIX}{shard.name}": shard.master}
    if with_optimizer:
        values |= {f"optimizer.{kept}.{shard.name}": flat for kept, flat in shard.state().items()}
    if average is not None and shard.owned:
        values[f"{AVERAGE_PREFIX}{shard.name}"] = average.values[shard.name]
    for key, flat in values.items():
        outer = Box(shard.placement.offsets, shard.placement.shape)
        yield from pieces_of_flat_range(key, shard.placement.global_shape, shard.start, flat, outer)


def saved_bytes(optimizer: Optimizer, *, with_optimizer: bool, with_frozen: bool = False) -> int:
    """Host memory for a copy of what this rank saves; the optimizer's state need not be there yet.

    Args:
        optimizer: of what is trained. with_optimizer: its state is saved. with_frozen: what is frozen is, too.
    """
    masters = pieces_of([shard for shard in optimizer.shards if shard.owned], False, None)
    kept = len(optimizer.algorithm.state) if with_optimizer else 0
    frozen = frozen_pieces([shard for shard in optimizer.frozen if shard.owned]) if with_frozen else []
    return copy_bytes(masters) * (1 + kept + (optimizer.average is not None)) + copy_bytes(frozen)
