"""Plain references of the operations a Wan transformer is made of, one function each.

They run on every device and are what a fast path is compared with. Shapes: B batch, T tokens, N heads, K head width,
D model width, S tokens of the attended sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Convert to the dtype in which norms, rotations and gates are computed: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Non-causal softmax attention, softmax(q k^T / sqrt(K)) v, without a mask.

    Args:
        q: [B, T, N, K].
        k, v: [B, S, N, K].

    Returns:
        [B, T, N, K] in the dtype of `q`.

    Source: Vaswani et al. 2017, equation 1.
    """
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, in fp32, cast back to the dtype of `x`.

    Args:
        x: [..., D]. For queries and keys D covers all heads: Wan normalises across heads, not inside each.
        weight: [D].
        eps: added to the mean square.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    return F.rms_norm(widen(x), weight.shape, widen(weight), eps).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (x[2i], x[2i+1]) of every head by the angle of their token, in fp32, cast back.

    Args:
        x: [B, T, N, K].
        cos, sin: [T, K/2] fp32, from `mm.wan.rope.rope_tables`.

    Returns:
        [B, T, N, K] in the dtype of `x`.

    Source: Su et al. 2021 (RoFormer), equation 34.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same for all heads
    even, odd = widen(x).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift in fp32, cast back to the dtype of `x`; the norm has no weight and no bias.

    Args:
        x: [B, T, D].
        shift, scale: [B, 1, D] fp32.
        eps: added to the variance.

    Source: Peebles and Xie 2023 (DiT), adaptive layer norm, section 3.2.
    """
    return (F.layer_norm(widen(x), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate, added in fp32, cast back to the dtype of `x`.

    Args:
        x: [B, T, D], the residual stream; y: [B, T, D], a branch's output.
        gate: [B, 1, D] fp32.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero, section 3.2.
    """
    return (widen(x) + widen(y) * gate).to(x.dtype)
