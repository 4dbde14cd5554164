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

    def expected(self, width: int, heads: int) -> float | None:
        """Bytes that a block keeps for each token and unit of width, by the formula."""
        return None if self.kept is None else self.kept + (4 * heads / width if self.keeps_statistics else 0)


def _keep(kept: int, *, inputs: bool, offload: bool) -> Mode:
    plan = Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O" if inputs else "O", offload=offload)
    return Mode(plan, 1, 2, kept, keeps_statistics=not offload)


MODES = {
    "none": Mode(None, 1, 1),
    "keep q,k,v,O": _keep(10, inputs=True, offload=False),
    "keep O": _keep(4, inputs=False, offload=False),
    "full": Mode(Recompute(), 2, 2, 2),
    "keep q,k,v,O, offloaded": _keep(0, inputs=True, offload=True),
    "keep O, offloaded": _keep(0, inputs=False, offload=True),
}
