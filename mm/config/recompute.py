"""Which blocks are computed again in backward instead of keeping what they made: `--recompute-*`.

Counts are of the blocks of one virtual pipeline stage, as in Megatron: every stage recomputes as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mm.config.train import TrainFlags


@dataclass(frozen=True)
class Recompute:
    """Full recomputation.

    Attributes:
        method: `uniform` cuts all blocks into groups and keeps the input of each group; `block` recomputes the first
            blocks, each by itself, and the others not at all.
        num_layers: blocks of a group, or blocks that are recomputed; None means groups of one, or all blocks.
    """

    method: Literal["uniform", "block"]
    num_layers: int | None

    def groups(self, num_blocks: int) -> Iterator[tuple[range, bool]]:
        """(blocks, whether they are recomputed together) of a stage, in order."""
        if self.method == "uniform":
            size = 1 if self.num_layers is None else self.num_layers
            for start in range(0, num_blocks, size):
                yield range(start, min(start + size, num_blocks)), True
            return
        recomputed = num_blocks if self.num_layers is None else min(self.num_layers, num_blocks)
        for index in range(num_blocks):
            yield range(index, index + 1), index < recomputed


def recompute_of(flags: TrainFlags) -> Recompute | None:
    """What checked flags ask for; None keeps everything."""
    if flags.recompute_granularity is None or flags.recompute_method is None:
        return None
    return Recompute(flags.recompute_method, flags.recompute_num_layers)
