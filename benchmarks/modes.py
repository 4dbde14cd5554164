"""The recomputation modes that benchmarks compare, and what each must cost."""

from __future__ import annotations

from dataclasses import dataclass

from mm.config.recompute import Recompute


@dataclass(frozen=True)
class Mode:
    """One way of running the blocks.

    Attributes:
        recompute: the plan; None keeps everything.
        attention_runs: forwards of self attention in a step. other_runs: of the rest of a block.
        kept: bytes that a block keeps for each token and unit of width in bf16, attention's statistics aside; None
            where no formula says.
        keeps_statistics: whether 4 bytes a token and head come to that.
    """

    recompute: Recompute | None
    attention_runs: int
    other_runs: int
    kept: int | None = None
    keeps_statistics: bool = False


MODES = {
    "none": Mode(None, 1, 1),
    "keep q,k,v,O": Mode(Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O"), 1, 2, 10, True),
    "keep O": Mode(Recompute(full_layers=0, keep_layers=None), 1, 2, 4, True),
    "full": Mode(Recompute(), 2, 2, 2),
    "keep q,k,v,O + offload": Mode(Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O", offload=True), 1, 2, 0),
    "keep O + offload": Mode(Recompute(full_layers=0, keep_layers=None, offload=True), 1, 2, 0),
}
