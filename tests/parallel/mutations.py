"""Defects of parallel training, made on purpose: nine classes, N1 to N9, that published trainers shipped.

`packed_mutations` has N10 to N13, which samples in one sequence add, and `family_mutations` those of other models.

A mutation replaces one function by a wrong one. Each goes with the layouts on which it is a defect and the measures of
the parity comparison that must see it (`test_mutations`).
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from mm.config.layout import Layout
from mm.diffusion.flow import FlowMatching
from mm.doctor import parity
from mm.ops.attention.segments import Segment
from mm.ops.elementwise import autograd, reference
from mm.ops.elementwise.operators import identity
from mm.optim import layerzero as layerzero_optimizer
from mm.optim import optimizer
from mm.optim.optimizer import Optimizer
from mm.parallel import context, ring, stage, tensor, ulysses
from mm.parallel.boundary import BoundaryShape
from mm.parallel.tokens import Run, TokenShare
from mm.train import step
from mm.train.parts import Part
from mm.wan import token_embedding
from mm.wan.model import Conditions, WanModel
from mm.wan.rope import RotaryTables


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A defect on one layout, and the measures of the comparison that must see it."""

    kind: str
    row: str
    caught_by: frozenset[str]
    break_it: Callable[[pytest.MonkeyPatch], None]

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.row}-{self.break_it.__name__}"


MUTATIONS: list[Mutation] = []


def mutation(kind: str, *rows: str, caught_by: str) -> Callable[[Any], Any]:
    """List the decorated function as a mutation of the rows."""

    def register(break_it: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        MUTATIONS.extend(Mutation(kind, row, frozenset(caught_by.split()), break_it) for row in rows)
        return break_it

    return register


# N1: a parameter that several ranks hold receives only a part of its gradient.


@mutation("N1", "tp2", "tp2sp", "tp2sp-ulysses2", caught_by="gradient norm")
def gradients_of_whole_parameters_not_added_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(optimizer, "gradient_is_partial", lambda name, sequence_parallel: False)


@mutation("N1", "tp2", caught_by="gradient norm")
def gradient_of_the_shared_input_not_added_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor, "_CopyIn", tensor._collective(tensor._same, tensor._same))


@mutation("N1", "tp2sp", caught_by="loss gradient norm")
def qk_norm_over_the_own_heads(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor.TensorAxis, "sum_statistics", lambda self, x: x * self.group.size())


@mutation("N1", "tp2sp", caught_by="gradient norm")
def gradient_of_qk_norm_statistics_not_added_up(patch: pytest.MonkeyPatch) -> None:
    backward = autograd._RMSNormRope.backward

    def wrong(ctx: Any, grad: Tensor) -> Any:
        ctx.norm = ctx.norm._replace(sum_over_ranks=identity)
        return backward(ctx, grad)

    patch.setattr(autograd._RMSNormRope, "backward", staticmethod(wrong))


@mutation("N1", "zero2", caught_by="gradient norm")
def gradients_of_replicated_parameters_not_added_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layerzero_optimizer, "dist", SimpleNamespace(all_reduce=lambda *args, **kwargs: None))


@mutation("N1", "ulysses2", "ring2", caught_by="gradient norm")
def gradients_not_added_up_over_context_ranks(patch: pytest.MonkeyPatch) -> None:
    apply = parity.apply

    def on_wrong_groups(wan: Any, mesh: Any, *rest: Any, **named: Any) -> Any:
        patch.setattr(mesh.groups, "dp_cp", mesh.groups.tp)  # of this rank alone, as there is one replica
        return apply(wan, mesh, *rest, **named)

    patch.setattr(parity, "apply", on_wrong_groups)


# N2: the gradient norm counts what several ranks hold several times, or not at all.


def norm_over(patch: pytest.MonkeyPatch, counted: Callable[[Any], bool]) -> None:
    squares = Optimizer.gradient_squares

    def wrong(self: Optimizer, beside: Tensor) -> tuple[Tensor, Tensor]:
        with pytest.MonkeyPatch.context() as shards:
            shards.setattr(self, "_shards", [dataclasses.replace(s, owned=counted(s)) for s in self.shards])
            return squares(self, beside)

    patch.setattr(Optimizer, "gradient_squares", wrong)


@mutation("N2", "tp2", "tp2sp", "ulysses2", "tp2sp-ulysses2", caught_by="norm")
def norm_counts_copies(patch: pytest.MonkeyPatch) -> None:
    norm_over(patch, lambda shard: True)


@mutation("N2", "tp2", "tp2sp", caught_by="norm")
def norm_drops_whole_parameters(patch: pytest.MonkeyPatch) -> None:
    norm_over(patch, lambda shard: shard.owned and shard.placement.sharded)


# N3: the loss of the context-parallel ranks is scaled by their number twice, or not at all.


def loss_scaled_by(patch: pytest.MonkeyPatch, factor: Callable[[int], int]) -> None:
    calculate = schedules.forward_step_calc_loss

    def wrong(*args: Any) -> Any:
        return calculate(*args[:8], factor(args[8]), *args[9:])  # the ninth is the context-parallel size

    patch.setattr(schedules, "forward_step_calc_loss", wrong)


@mutation("N3", "ulysses2", "ring2", "usp2x2", caught_by="gradient norm")
def loss_not_scaled_by_context_ranks(patch: pytest.MonkeyPatch) -> None:
    loss_scaled_by(patch, lambda cp_size: 1)


@mutation("N3", "ulysses2", caught_by="gradient norm")
def loss_scaled_twice_by_context_ranks(patch: pytest.MonkeyPatch) -> None:
    loss_scaled_by(patch, lambda cp_size: cp_size**2)


@mutation("N3", "ulysses2", "tp2sp", caught_by="loss gradient norm")
def loss_is_the_mean_over_the_own_tokens(patch: pytest.MonkeyPatch) -> None:
    loss = FlowMatching.loss
    patch.setattr(FlowMatching, "loss", lambda self, *args: loss(self, *args[:3]))


# N4: layers are dropped where their number does not divide.


@mutation("N4", "pp2", "pp2vp2", "pp4", caught_by="loss gradient norm names")
def stages_cut_by_floor_division(patch: pytest.MonkeyPatch) -> None:
    def blocks(layout: Layout, pp_rank: int, vp_rank: int) -> range:
        size = sum(map(sum, layout.stages)) // (layout.pp_size * layout.vp_size)
        start = (vp_rank * layout.pp_size + pp_rank) * size
        return range(start, start + size)

    patch.setattr(Layout, "blocks", blocks)


@mutation("N4", "pp2", caught_by="loss gradient norm")
def last_block_of_a_stage_not_run(patch: pytest.MonkeyPatch) -> None:
    def run_blocks(self: WanModel, streams: Any, conditions: Conditions, positions: Any, inputs: Any) -> Any:
        for layer in self.layers(inputs, streams[0].device)[:-1]:
            streams = layer(streams, conditions.time_modulation, conditions.context, positions)
        return streams

    patch.setattr(WanModel, "run_blocks", run_blocks)


# N5: the embedders do not receive the gradients of all stages.


def conditions_received(patch: pytest.MonkeyPatch, change: Callable[[Conditions], Conditions]) -> None:
    receive = stage.receive_side

    def wrong(*args: Any) -> tuple[Any, Conditions]:
        streams, conditions = receive(*args)
        return streams, change(conditions)

    patch.setattr(stage, "receive_side", wrong)


@mutation("N5", "pp2", "pp2vp2", "pp4", caught_by="gradient norm")
def later_stages_keep_the_gradient_of_the_conditions(patch: pytest.MonkeyPatch) -> None:
    conditions_received(patch, lambda c: Conditions(c.time.detach(), c.time_modulation.detach(), c.context.detach()))


@mutation("N5", "pp2", caught_by="gradient norm")
def head_keeps_the_gradient_of_the_time(patch: pytest.MonkeyPatch) -> None:
    conditions_received(patch, lambda c: dataclasses.replace(c, time=c.time.detach()))


# N6: what runs blocks in groups gives every block the input of the group.


@mutation("N6", "pp2", "ulysses2", caught_by="loss gradient norm")
def every_block_gets_the_input_of_the_stage(patch: pytest.MonkeyPatch) -> None:
    def run_blocks(self: WanModel, streams: Any, conditions: Conditions, positions: Any, inputs: Any) -> Any:
        outputs = [
            block(streams[0], conditions.time_modulation, conditions.context, positions)
            for block in self.blocks.values()
        ]
        return (outputs[-1],)

    patch.setattr(WanModel, "run_blocks", run_blocks)


@mutation("N6", "pp2", caught_by="gradient norm")
def backward_sees_every_block_at_the_input_of_the_stage(patch: pytest.MonkeyPatch) -> None:
    def run_blocks(self: WanModel, streams: Any, conditions: Conditions, positions: Any, inputs: Any) -> Any:
        (hidden,) = streams
        first = hidden
        for block in self.blocks.values():
            right = block(hidden, conditions.time_modulation, conditions.context, positions)
            wrong_input = hidden + (first - hidden).detach()  # the value of one, the gradient into the other
            wrong = block(wrong_input, conditions.time_modulation, conditions.context, positions)
            hidden = wrong + (right - wrong).detach()
        return (hidden,)

    patch.setattr(WanModel, "run_blocks", run_blocks)


# N7: two sides agree with each other, and not with the model.


@mutation("N7", "ulysses2", "usp2x2", caught_by="loss gradient norm")
def exchanges_agree_on_a_wrong_order_of_ranks(patch: pytest.MonkeyPatch) -> None:
    """The tokens come back to where they were; only the padding, which is cut off at the end, is not at the end."""
    scatter, gather = ulysses._tokens_for_heads, ulysses._heads_for_tokens

    def reverse(tensors: tuple[Tensor, ...], group: Any) -> tuple[Tensor, ...]:
        return tuple(x.unflatten(1, (group.size(), -1)).flip(1).flatten(1, 2) for x in tensors)

    patch.setattr(ulysses, "_tokens_for_heads", lambda tensors, group: reverse(scatter(tensors, group), group))
    patch.setattr(ulysses, "_heads_for_tokens", lambda tensors, group: gather(reverse(tensors, group), group))


@mutation("N7", "ulysses2-even", caught_by="loss gradient norm")
def input_and_target_agree_on_tokens_that_are_not_where_their_positions_are(patch: pytest.MonkeyPatch) -> None:
    def every_second(self: TokenShare, samples: list[Tensor], dim: int) -> Tensor:
        (x,) = samples
        return x.unflatten(dim, (-1, self.cp_size)).select(dim + 1, self.cp_rank)

    patch.setattr(TokenShare, "take", every_second)


@mutation("N7", "ulysses2", caught_by="loss gradient norm")
def input_and_target_agree_on_a_wrong_order_inside_a_patch(patch: pytest.MonkeyPatch) -> None:
    patchify = step.patchify
    for module in (step, token_embedding):
        patch.setattr(module, "patchify", lambda latents, size: patchify(latents, size).flip(-1))


# N8: padding leaks.


@mutation("N8", "ulysses2", "tp2sp", caught_by="loss gradient norm")
def attention_sees_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(context, "_whole_sequence", lambda q, k, v, *rest: reference.attention(q, k, v))


@mutation("N8", "ring2", "usp2x2", caught_by="loss gradient norm")
def ring_sees_padding(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Segment, "real", lambda self, chunk=0: self.places)


@mutation("N8", "ulysses2", "ring2", "tp2sp", caught_by="loss gradient norm")
def loss_counts_padding(patch: pytest.MonkeyPatch) -> None:
    draw = step.draw_parts

    def wrong(*args: Any) -> list[tuple[Part, ...]]:
        """The last part of each sample as long as any padding."""
        longer = [(*parts, dataclasses.replace(last, tokens=2 * last.tokens)) for *parts, last in draw(*args)]
        return [tuple(parts) for parts in longer]

    patch.setattr(step, "draw_parts", wrong)
    patch.setattr(Run, "real", property(lambda self: self.places))


# N9: something that is fp32 passes through a shorter type.


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


@mutation("N9", "pp2", "ulysses2", caught_by="loss gradient norm")
def timesteps_rounded(patch: pytest.MonkeyPatch) -> None:
    draw = FlowMatching.draw_timesteps

    def wrong(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        sigma, timestep, weight = draw(*args)
        return sigma, rounded(timestep), weight

    patch.setattr(FlowMatching, "draw_timesteps", wrong)


@mutation("N9", "pp2", "pp2vp2", caught_by="loss gradient norm")
def modulation_rounded_at_the_boundary(patch: pytest.MonkeyPatch) -> None:
    join = BoundaryShape.join

    def wrong(self: BoundaryShape, modulation: Tensor, time: Tensor, *others: Tensor) -> Tensor:
        return join(self, rounded(modulation), rounded(time), *others)

    patch.setattr(BoundaryShape, "join", wrong)


@mutation("N9", "ulysses2", "tp2sp", caught_by="gradient")
def rotary_tables_rounded(patch: pytest.MonkeyPatch) -> None:
    tables = RotaryTables.tables
    patch.setattr(RotaryTables, "tables", lambda *args: tuple(rounded(table) for table in tables(*args)))


@mutation("N9", "ring2", caught_by="gradient")
def ring_accumulates_in_short(patch: pytest.MonkeyPatch) -> None:
    merge = ring.merge_attention

    def wrong(*args: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge(*args)
        return out.copy_(rounded(out)), lse

    patch.setattr(ring, "merge_attention", wrong)


@mutation("N9", "tp2sp", caught_by="loss gradient norm")
def qk_norm_statistics_rounded(patch: pytest.MonkeyPatch) -> None:
    sum_statistics = tensor.TensorAxis.sum_statistics
    patch.setattr(tensor.TensorAxis, "sum_statistics", lambda self, x: rounded(sum_statistics(self, x)))
