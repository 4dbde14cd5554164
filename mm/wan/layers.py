"""The layers a Wan model is put together from, and `ModuleFactories`, through which they are handed in.

The model asks `ModuleFactories` for every layer whose implementation depends on how it is run. The defaults are the
single device; tensor parallelism hands in sharded linears and norms, context parallelism another attention. The model
itself stays the same, and its parameter names too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.ops.attention.api import ActivationPolicy, Attend, attention, keep_inputs, keep_nothing
from mm.ops.attention.packed import segment_attention
from mm.ops.attention.segments import Pairs, Segments
from mm.ops.elementwise import autograd as ops
from mm.ops.elementwise.operators import HeadNorm, SumOverRanks, identity
from mm.wan.rope import Positions

LinearFactory = Callable[[int, int], nn.Module]
"""(in_features, out_features) -> a module with `weight` and `bias` whose forward maps a tensor to a tensor.

Where a rank has only its share of the inputs, the module's `add_up` makes the whole result before the bias is added.
"""

QKNormFactory = Callable[[int, int, float], nn.Module]
"""(width, head_dim, eps) -> a module like `QKNorm`, with `weight` [width] (or this rank's share of it)."""

Columns = Callable[[Tensor, Sequence[nn.Module]], list[Tensor]]
"""(x [B, T, D], column linears) -> what each of them makes of x; they are called together because they share x."""

CrossAttention = Callable[[Tensor, Tensor, Tensor, Pairs | None], Tensor]
"""(q [B, T, N, K], k [B, L, N, K], v [B, L, N, K], pairs) -> [B, T, N, K]; pairs where samples share a sequence."""

SelfAttention = Callable[[Tensor, Tensor, Tensor, Segments, ActivationPolicy], Tensor]
"""(q, k, v [B, T, N, K], segments, keep) -> [B, T, N, K]; segments have the tokens of all ranks' shares together.

`keep` (`mm.ops.attention.api.ActivationPolicy`) is asked for what attention reads and gives, so that recomputation can
keep it.
"""


Streams = tuple[Tensor, ...]
"""What layers hand on, [B, T, D] each: the residual stream, and behind it the side blocks' where there are some."""


class BlockLayer(Protocol):
    """A layer as `mm.wan.block.Layer`."""

    def __call__(
        self,
        streams: Streams,
        time_modulation: Tensor,
        context: Tensor,
        positions: Positions,
        keep: ActivationPolicy = keep_nothing,
    ) -> Streams:
        """The streams after the layer."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of its blocks."""


BlockRunner = Callable[[Sequence[BlockLayer], Streams, Tensor, Tensor, Positions], Streams]
"""(layers, streams, time_modulation, context, positions) -> streams; arguments as for `mm.wan.block.WanBlock`."""


def run_in_order(
    layers: Sequence[BlockLayer],
    streams: Streams,
    time_modulation: Tensor,
    context: Tensor,
    positions: Positions,
    keep: ActivationPolicy = keep_nothing,
) -> Streams:
    """The plain `BlockRunner`; `keep` is handed to every layer."""
    for layer in layers:
        streams = layer(streams, time_modulation, context, positions, keep)
    return streams


def apply_columns(x: Tensor, linears: Sequence[nn.Module]) -> list[Tensor]:
    """The single-device `Columns`: each linear of x."""
    return [linear(x) for linear in linears]


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    keep: ActivationPolicy = keep_nothing,
    *,
    attend: Attend = attention,
) -> Tensor:
    """The single-device `SelfAttention`: all tokens are here, so their number is in the shapes."""
    num_tokens = sum(segment.num_tokens for segment in segments.each)
    if q.shape[1] != num_tokens:
        raise ValueError(f"{q.shape[1]} tokens at hand, {num_tokens} in the samples")
    q, k, v = keep_inputs(q, k, v, keep)
    if len(segments.each) == 1:
        return attend(q, k, v, keep)
    return segment_attention(q, k, v, segments.pairs(), keep)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs | None = None) -> Tensor:
    """The `CrossAttention`: every rank has all of the context."""
    return attention(q, k, v) if pairs is None else segment_attention(q, k, v, pairs)


class QKNorm(nn.Module):
    """RMSNorm of queries or keys over all heads with fp32 statistics, and the rotation by their positions.

    Args:
        width: of all heads. head_dim: K. eps: added to the mean square.
        shares: ranks that have equal shares of the heads. sum_over_ranks: adds up over them.
    """

    def __init__(
        self, width: int, head_dim: int, eps: float, shares: int = 1, sum_over_ranks: SumOverRanks = identity
    ) -> None:
        super().__init__()
        self.width, self.head_dim, self.eps = width, head_dim, eps
        self.sum_over_ranks = sum_over_ranks
        self.weight = nn.Parameter(torch.ones(width // shares))

    def forward(self, x: Tensor, positions: Positions | None = None) -> Tensor:
        """[B, T, N*K] to [B, T, N, K] in the dtype of `x`; without positions nothing is rotated."""
        rotation = None if positions is None else (positions.cos, positions.sin)
        norm = HeadNorm(self.head_dim, self.eps, self.width, self.sum_over_ranks)
        return ops.rms_norm_rope(x, self.weight, rotation, norm)


class Fp32LayerNorm(nn.LayerNorm):
    """Affine LayerNorm computed in fp32 for any dtype of input and parameters; the result has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        weight, bias = (value.float().view(1, 1, -1) for value in (self.weight, self.bias))
        return ops.layer_norm(x, weight, bias, self.eps)


class Fp32Linear(nn.Linear):
    """Linear computed in fp32, with an fp32 result, for any dtype of input and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features] fp32."""
        return F.linear(x.float(), self.weight.float(), self.bias.float())


@dataclass(frozen=True)
class ModuleFactories:
    """Factories of the model's modules. Every field has its single-device default.

    Attributes:
        column: linears whose output may be sharded over a tensor-parallel axis: q, k, v, k_img, v_img and ffn.0.
        row: linears whose input may be sharded the same way and whose output is whole: o and ffn.2.
        columns: applies column linears that share one input; with tensor parallelism it makes the input whole, once.
        linear: whole linears in the parameter dtype: text and image embedding.
        linear_fp32: whole linears computed in fp32: time embedding, time projection, head.
        qk_norm: norm of queries and keys over all heads; with sharded heads it must still use statistics of all.
        self_attention: attention among the video tokens; with context parallelism T is this rank's share.
        cross_attention: attention from video tokens to text or image tokens, which every rank has whole.
        run_blocks: runs consecutive blocks; recomputation changes what they keep for backward.
    """

    column: LinearFactory = nn.Linear
    row: LinearFactory = nn.Linear
    columns: Columns = apply_columns
    linear: LinearFactory = nn.Linear
    linear_fp32: LinearFactory = Fp32Linear
    qk_norm: QKNormFactory = QKNorm
    self_attention: SelfAttention = self_attention
    cross_attention: CrossAttention = cross_attention
    run_blocks: BlockRunner = run_in_order
