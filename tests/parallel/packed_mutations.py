"""Defects of parallel training, made on purpose: N10 to N13, which samples in one sequence add to those of `mutations`.

`MUTATIONS` has all of them.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from mutations import MUTATIONS, mutation
from torch import Tensor

from mm.diffusion.flow import FlowMatching
from mm.doctor import parity
from mm.ops.attention.segments import Pair, Pairs
from mm.ops.elementwise import reference
from mm.parallel import context
from mm.parallel.tokens import TokenShare
from mm.train import step
from mm.wan import block as wan_block
from mm.wan import layers, model
from mm.wan.packed import PackedTokens, by_run
from mm.wan.rope import RotaryTables

__all__ = ["MUTATIONS"]

# N10: a sample sees another one.

PACKED = ("packed-dp2", "packed-ulysses2", "packed-ring2", "packed-tp2sp", "packed-pp2")


@mutation("N10", *PACKED, caught_by="loss gradient norm")
def a_sample_sees_the_keys_of_its_neighbour_too(patch: pytest.MonkeyPatch) -> None:
    """Each but the last also sees the next one's first token in memory, as with lengths that are off by one."""
    of_rows = Pairs.of_rows.__func__

    def wrong(cls: Any, queries: Any, keys: Any) -> Pairs:
        pairs = of_rows(cls, queries, keys)
        shifted = [Pair(q, slice(k.start, k.stop + 1)) for q, k in pairs.each[:-1]]
        return cls((*shifted, *pairs.each[-1:]))

    patch.setattr(Pairs, "of_rows", classmethod(wrong))


@mutation("N10", "packed-dp2", "packed-ulysses2", caught_by="loss gradient norm")
def all_samples_are_one(patch: pytest.MonkeyPatch) -> None:
    for module in (layers, context):
        patch.setattr(module, "segment_attention", lambda q, k, v, pairs, keep=None: reference.attention(q, k, v))


# N11: positions are not counted from a sample's own origin. (Attention sees differences of positions alone: an origin
# that is wrong for all tokens of a sample is no defect.)


@mutation("N11", *PACKED, caught_by="loss gradient norm")
def positions_go_on_in_the_grid_of_the_first_sample(patch: pytest.MonkeyPatch) -> None:
    tables = RotaryTables.tables
    first = (3, 3, 5)

    def wrong(self: RotaryTables, grid: Any, device: Any) -> Any:
        if grid == first:
            return tables(self, grid, device)
        start = math.prod(first)
        return tuple(x[start : start + math.prod(grid)] for x in tables(self, (9, 3, 5), device))

    patch.setattr(RotaryTables, "tables", wrong)


@mutation("N11", *PACKED, caught_by="loss gradient norm")
def every_sample_begins_at_the_last_position_of_the_one_before(patch: pytest.MonkeyPatch) -> None:
    take_chunk = TokenShare.take_chunk

    def wrong(self: TokenShare, samples: Any, dim: int) -> Tensor:
        lengths = [len(x) for x in samples]
        return take_chunk(self, torch.cat(list(samples)).roll(1, 0).split(lengths), dim)

    patch.setattr(TokenShare, "take_chunk", wrong)


# N12: samples weigh by their tokens, or the more the fewer share their sequence.


@mutation("N12", *PACKED, caught_by="loss gradient norm")
def loss_is_the_mean_over_tokens(patch: pytest.MonkeyPatch) -> None:
    loss = FlowMatching.loss
    patch.setattr(FlowMatching, "loss", lambda self, a, b, w, elements: loss(self, a, b, w, 16 * 4 * 20))


@mutation("N12", *PACKED, caught_by="gradient norm")
def sequences_weigh_alike(patch: pytest.MonkeyPatch) -> None:
    compute = parity.compute_gradients

    def wrong(*args: Any) -> Tensor:
        forward_backward = step.forward_backward

        def alike(parallel: Any, forward_step: Any, batches: Any, lengths_of: Any) -> Any:
            def one(stage: Any, module: Any, batch: Any) -> Any:
                output, loss = forward_step(stage, module, batch)
                share = args[4].step / (len(batch["sample"]) * len(batches) * parallel.mesh.layout.dp_size)

                def weighted(velocity: Tensor) -> tuple[Tensor, Tensor]:
                    value, reported = loss(velocity)
                    return value * share, reported

                return output, weighted

            return forward_backward(parallel, one, batches, lengths_of)

        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(step, "forward_backward", alike)
            return compute(*args)

    patch.setattr(parity, "compute_gradients", wrong)


# N13: a sample gets the text or the timestep of another one.


@mutation("N13", *PACKED, caught_by="loss gradient norm")
def text_of_a_neighbour(patch: pytest.MonkeyPatch) -> None:
    of_counts = PackedTokens.of_counts.__func__

    def wrong(cls: Any, *args: Any) -> PackedTokens:
        packed = of_counts(cls, *args)
        keys = [pair.keys for pair in packed.text.each]
        turned = [Pair(pair.queries, k) for pair, k in zip(packed.text.each, keys[1:] + keys[:1], strict=True)]
        return dataclasses.replace(packed, text=Pairs(tuple(turned)))

    patch.setattr(PackedTokens, "of_counts", classmethod(wrong))


@mutation("N13", *PACKED, caught_by="loss gradient norm")
def timestep_of_the_first_sample(patch: pytest.MonkeyPatch) -> None:
    def wrong(function: Any, streams: Any, parameters: Any, packed: Any) -> Tensor:
        return by_run(function, streams, [value[:1].expand_as(value) for value in parameters], packed)

    for module in (wan_block, model):
        patch.setattr(module, "by_run", wrong)
