"""The section `memory`: what is computed again, what waits in host memory, what is compiled."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section


class MemorySection(Section):
    """Memory that blocks keep for backward.

    Attributes:
        recompute: full: compute blocks again in backward instead of keeping what they made; selective: all blocks,
            except for self attention, whose output is kept; None keeps everything.
        method: of full recomputation; uniform: all blocks, in groups; block: the first blocks of every stage.
        blocks: of a group (uniform; default 1), or to recompute (block; default all).
        keep_attention: full: leave self attention out; with block for the blocks after the first ones.
        keep_attention_blocks: how many after the first ones; None means all the others.
        keep: what is kept of self attention: its output (the default), or its inputs too.
        offload: what blocks that keep their attention keep waits for backward in host memory.
        compile_blocks: compile each block with torch.compile.
    """

    recompute: Literal["full", "selective"] | None = None
    method: Literal["uniform", "block"] | None = None
    blocks: int | None = Field(None, ge=0)
    keep_attention: bool = False
    keep_attention_blocks: int | None = Field(None, ge=1)
    keep: Literal["O", "q,k,v,O"] | None = None
    offload: bool = False
    compile_blocks: bool = False
