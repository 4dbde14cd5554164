"""One Wan transformer block: self attention, cross attention to the text, feed-forward.

Shapes: B batch, T video tokens, L text tokens, D model width, N heads (this rank's share when they are sharded),
K head width. Parameter names are those of the original Wan weights.

Source: Wan technical report (arXiv 2503.20314) section 4.2; the residual stream has the parameter dtype, everything
that modulates, normalises or gates it is computed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.device import kernels
from mm.wan.layers import Fp32LayerNorm, Parts


class AttentionProjections(nn.Module):
    """The projections that self attention and cross attention have in common."""

    def __init__(self, config: WanConfig, parts: Parts) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_dim = config.head_dim
        self.q = parts.column(width, width)
        self.k = parts.column(width, width)
        self.v = parts.column(width, width)
        self.o = parts.row(width, width)
        self.norm_q = parts.qk_norm(width, config.eps)
        self.norm_k = parts.qk_norm(width, config.eps)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x` [B, T, D], keys and values of `source` [B, S, D], each as [B, T or S, N, K]."""
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads comes from the width at hand: a sharded projection gives this rank's heads only.
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(AttentionProjections):
    """Attention among the video tokens, with rotary positions."""

    def __init__(self, config: WanConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.attention = parts.self_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]; cos and sin are [T, K/2]."""
        q, k, v = self.project(x, x)
        q, k = kernels.apply_rope(q, cos, sin), kernels.apply_rope(k, cos, sin)
        out: Tensor = self.o(self.attention(q, k, v).flatten(2))
        return out


class CrossAttention(AttentionProjections):
    """Attention from the video tokens to the text tokens. No mask: Wan lets padded text take part."""

    def __init__(self, config: WanConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.attention = parts.cross_attention

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, T, D], context [B, L, D], to [B, T, D]."""
        q, k, v = self.project(x, context)
        out: Tensor = self.o(self.attention(q, k, v).flatten(2))
        return out


class WanBlock(nn.Module):
    """Self attention and feed-forward are modulated and gated by the timestep; cross attention is neither."""

    def __init__(self, config: WanConfig, parts: Parts) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config, parts)
        self.norm3 = Fp32LayerNorm(config.hidden_size, eps=config.eps)
        self.cross_attn = CrossAttention(config, parts)
        self.ffn = nn.Sequential(
            parts.column(config.hidden_size, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            parts.row(config.ffn_dim, config.hidden_size),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.hidden_size))  # init_weights or a file fills it

    def forward(self, x: Tensor, time_modulation: Tensor, context: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One block.

        Args:
            x: [B, T, D], the residual stream.
            time_modulation: [B, 6, D] fp32; shift, scale and gate of self attention, then of the feed-forward.
            context: [B, L, D], embedded text.
            cos, sin: [T, K/2] fp32, rotary tables.

        Returns:
            [B, T, D] in the dtype of `x`.
        """
        modulation = self.modulation.float() + time_modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.chunk(6, dim=1)  # [B, 1, D] each
        y = self.self_attn(kernels.modulate(x, shift, scale, self.eps), cos, sin)
        x = kernels.gated_residual(x, y, gate)
        x = x + self.cross_attn(self.norm3(x), context)
        y = self.ffn(kernels.modulate(x, ffn_shift, ffn_scale, self.eps))
        return kernels.gated_residual(x, y, ffn_gate)
