"""Recomputation: the blocks computed again in backward instead of keeping what they made, and what they keep anyway.

Counts are of the blocks of one virtual pipeline stage, as in Megatron: every stage recomputes as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mm.config.run.memory import MemorySection

Mode = Literal["full", "keep attention", "none"]
"""Recomputed whole; recomputed except for self attention; not recomputed."""

Kept = Literal["O", "q,k,v,O"]
"""What recomputation keeps of self attention: its output, or its inputs too; always the log-sum-exp as well."""


@dataclass(frozen=True)
class Recompute:
    """The first blocks are recomputed whole, those after them except for self attention, the rest not at all.

    Attributes:
        group_size: blocks that are recomputed together; only the input of the group is kept.
        full_layers: blocks recomputed whole; None means all.
        keep_layers: of those after them, the blocks that keep attention; None means all.
        kept: what these keep of it.
        offload: whether all that they keep, their input included, waits for backward in host memory.
    """

    group_size: int = 1
    full_layers: int | None = None
    keep_layers: int | None = 0
    kept: Kept = "O"
    offload: bool = False

    def groups(self, num_blocks: int) -> Iterator[tuple[range, Mode]]:
        """(blocks, how they run) of a stage, in order."""
        full = num_blocks if self.full_layers is None else min(self.full_layers, num_blocks)
        keep = num_blocks if self.keep_layers is None else min(full + self.keep_layers, num_blocks)
        parts: list[tuple[int, int, int, Mode]] = [
            (0, full, self.group_size, "full"),
            (full, keep, self.group_size, "keep attention"),
            (keep, num_blocks, 1, "none"),
        ]
        for first, end, size, mode in parts:
            for start in range(first, end, size):
                yield range(start, min(start + size, end)), mode


def recompute_of(memory: MemorySection) -> Recompute | None:
    """Plan that a checked section asks for; None keeps everything."""
    if memory.recompute is None:
        return None
    kept, offload = memory.keep or "O", memory.offload
    if memory.recompute == "selective":
        return Recompute(full_layers=0, keep_layers=None, kept=kept, offload=offload)
    if memory.method == "uniform":
        size = memory.blocks or 1
        return Recompute(size, 0, None, kept, offload) if memory.keep_attention else Recompute(size)
    if not memory.keep_attention:
        return Recompute(full_layers=memory.blocks)
    return Recompute(1, memory.blocks, memory.keep_attention_blocks, kept, offload)
