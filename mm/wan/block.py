"""One Wan transformer block: self attention, cross attention to images and text, feed-forward.

Shapes: B batch, T video tokens, I image tokens (none in text-to-video models), L text tokens, D model width, N heads
(this rank's share when they are sharded), K head width. Parameter names are those of the original Wan weights.

Source: Wan technical report (arXiv 2503.20314) section 4.2; the residual stream has the parameter dtype, everything
that modulates, normalises or gates it is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.ops.attention.api import ActivationPolicy, keep_nothing
from mm.ops.elementwise import autograd as ops
from mm.wan.layers import Fp32LayerNorm, ModuleFactories, Streams
from mm.wan.packed import PackedTokens, by_run
from mm.wan.rope import Positions


class Attention(nn.Module):
    """The projections that self attention and cross attention have in common."""

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.columns = parts.columns
        self.q = parts.column(width, width)
        self.k = parts.column(width, width)
        self.v = parts.column(width, width)
        self.o = parts.row(width, width)
        self.norm_q = parts.qk_norm(width, config.head_dim, config.eps)
        self.norm_k = parts.qk_norm(width, config.head_dim, config.eps)

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, N*K] to [B, T, N, K]."""
        # The number of heads comes from the width at hand: a sharded projection gives this rank's heads only.
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Attention among the video tokens, with rotary positions."""

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__(config, parts)
        self.attention = parts.self_attention

    def forward(self, x: Tensor, positions: Positions, keep: ActivationPolicy = keep_nothing) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        q, k, v = self.columns(x, (self.q, self.k, self.v))
        q, k, v = self.norm_q(q, positions), self.norm_k(k, positions), self.heads(v)
        out: Tensor = self.o(self.attention(q, k, v, positions.segments, keep).flatten(2))
        return out


class CrossAttention(Attention):
    """Attention from the video tokens to the text tokens. No mask: Wan lets padded text take part.

    With images the same queries also attend to the image tokens, with keys and values of their own, and the results
    of the two attentions are added.
    """

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__(config, parts)
        self.attention = parts.cross_attention
        self.image_tokens = config.image_tokens
        if self.image_tokens:
            width = config.hidden_size
            self.k_img = parts.column(width, width)
            self.v_img = parts.column(width, width)
            self.norm_k_img = parts.qk_norm(width, config.head_dim, config.eps)

    def forward(self, x: Tensor, context: Tensor, packed: PackedTokens | None = None) -> Tensor:
        """x [B, T, D], context [B, I + L, D] (image tokens, then text tokens), to [B, T, D].

        Where samples share a sequence, the context has the images of all, then the text of all.
        """
        (q,) = self.columns(x, (self.q,))
        q = self.norm_q(q)
        texts = packed.text if packed else None
        # Every rank has the whole context: its projections have nothing to make whole.
        if not self.image_tokens:
            attended = self.attention(q, self.norm_k(self.k(context)), self.heads(self.v(context)), texts)
        else:
            image_tokens = self.image_tokens * (packed.num_samples if packed else 1)
            images, text = context.split((image_tokens, context.shape[1] - image_tokens), dim=1)
            of_text = self.attention(q, self.norm_k(self.k(text)), self.heads(self.v(text)), texts)
            pairs = packed.images if packed else None
            of_images = self.attention(q, self.norm_k_img(self.k_img(images)), self.heads(self.v_img(images)), pairs)
            attended = of_text + of_images
        out: Tensor = self.o(attended.flatten(2))
        return out


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; a Sequential because the weights are named by its indices."""

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        wide, narrow = config.ffn_dim, config.hidden_size
        super().__init__(parts.column(narrow, wide), nn.GELU(approximate="tanh"), parts.row(wide, narrow))
        self.columns = parts.columns

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        (hidden,) = self.columns(x, (self[0],))
        out: Tensor = self[2](self[1](hidden))
        return out


class WanBlock(nn.Module):
    """Self attention and feed-forward are modulated and gated by the timestep; cross attention is neither."""

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config, parts)
        self.norm3 = Fp32LayerNorm(config.hidden_size, eps=config.eps)
        self.cross_attn = CrossAttention(config, parts)
        self.ffn = FeedForward(config, parts)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.hidden_size))  # init_weights or a file fills it

    def forward(
        self,
        x: Tensor,
        time_modulation: Tensor,
        context: Tensor,
        positions: Positions,
        keep: ActivationPolicy = keep_nothing,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, T, D], the residual stream.
            time_modulation: [B, 6, D] fp32; shift, scale and gate of self attention, then of the feed-forward. For
                each run of `positions.runs` such rows.
            context: [B, I + L, D], embedded images, then embedded text.
            positions: of the T tokens.
            keep: what is kept of self attention when the block is recomputed.

        Returns:
            [B, T, D] in the dtype of `x`.
        """
        modulation = self.modulation.float() + time_modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=1)  # [B, 1, D] each
        runs = positions.runs
        norm = partial(ops.layer_norm, eps=self.eps)
        y = self.self_attn(by_run(norm, [x], [1 + scale, shift], runs), positions, keep)
        x = by_run(ops.gated_residual, [x, y], [gate], runs)
        x = x + self.cross_attn(self.norm3(x), context, positions.packed)
        y = self.ffn(by_run(norm, [x], [1 + ffn_scale, ffn_shift], runs))
        return by_run(ops.gated_residual, [x, y], [ffn_gate], runs)


class SideBlock(WanBlock):
    """A block of the stream beside the video's. What it makes of its stream is a hint to a block of the model.

    New ones give hints of zeros, so that training begins with the model as it was.

    Source: VACE (arXiv 2503.07598) section 3.3 and the released weights.
    """

    def __init__(self, config: WanConfig, parts: ModuleFactories, *, first: bool) -> None:
        super().__init__(config, parts)
        self.before_proj = parts.linear(config.hidden_size, config.hidden_size) if first else None
        self.after_proj = parts.linear(config.hidden_size, config.hidden_size)

    def forward(  # type: ignore[override]  # a block of two streams
        self,
        x: Tensor,
        side: Tensor,
        time_modulation: Tensor,
        context: Tensor,
        positions: Positions,
        keep: ActivationPolicy = keep_nothing,
    ) -> tuple[Tensor, Tensor]:
        """One side block.

        Args:
            x: [B, T, D], the video's stream; the first side block adds it to the other one.
            side: [B, T, D], the stream beside it.
            time_modulation, context, positions, keep: as for `WanBlock`.

        Returns:
            The stream beside the video's and the hint, [B, T, D] each.
        """
        if self.before_proj is not None:
            side = self.before_proj(side) + x
        side = super().forward(side, time_modulation, context, positions, keep)
        return side, self.after_proj(side)


@dataclass(frozen=True)
class Layer:
    """A block of the model, with the side block whose hint it takes.

    Attributes:
        block: of the model. side: the side block, or None.
        hint_scale: [B, 1, 1], a factor on the hint, or one for each run of `Positions.runs`; None for 1.
    """

    block: nn.Module
    side: nn.Module | None = None
    hint_scale: Tensor | None = None

    def __call__(
        self,
        streams: Streams,
        time_modulation: Tensor,
        context: Tensor,
        positions: Positions,
        keep: ActivationPolicy = keep_nothing,
    ) -> Streams:
        """The streams after the layer; arguments as for `WanBlock`.

        A side block runs just before its block and not before all of them, so that no hint waits.
        """
        x, *others = streams
        if self.side is None:
            return self.block(x, time_modulation, context, positions, keep), *others
        side, hint = self.side(x, *others, time_modulation, context, positions, keep)
        x = self.block(x, time_modulation, context, positions, keep)
        if self.hint_scale is not None:
            hint = by_run(torch.mul, [hint], [self.hint_scale.to(hint.dtype)], positions.runs)
        return x + hint, side

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of both blocks."""
        yield from self.block.parameters()
        if self.side is not None:
            yield from self.side.parameters()
