"""Runs the blocks of a stage so that some of them are computed again in backward.

A recomputed group keeps its input and nothing else; torch's checkpoint runs it a second time when backward needs what
it made. The second run does the same operations in the same order, so losses and gradients keep every bit. Blocks have
no dropout and draw no random numbers, so no generator's state is kept.

Source: Chen et al. 2016 (arXiv 1604.06174), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.config.recompute import Recompute
from mm.wan.layers import BlockRunner, run_in_order
from mm.wan.rope import Positions


def block_runner(recompute: Recompute | None) -> BlockRunner:
    """The `Parts.run_blocks` of a plan."""
    if recompute is None:
        return run_in_order

    def run(
        blocks: Sequence[nn.Module], hidden: Tensor, time_modulation: Tensor, context: Tensor, positions: Positions
    ) -> Tensor:
        for indices, again in recompute.groups(len(blocks)):
            group = blocks[indices.start : indices.stop]
            if again:
                hidden = checkpoint(
                    run_in_order, group, hidden, time_modulation, context, positions,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                hidden = run_in_order(group, hidden, time_modulation, context, positions)
        return hidden

    return run
