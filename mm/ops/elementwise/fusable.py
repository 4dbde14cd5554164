"""The arithmetic of the elementwise operators in terms that a compiler fuses into one loop.

Plain torch is fastest eagerly with complex products for the rotation and matrix products for sums of products. Inside
a compiled graph each of these is a call that nothing fuses with; products and sums of their own are.
Shapes as in `mm.ops.elementwise.operators`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.ops.elementwise.operators import HeadNorm, Operators, Rotation
from mm.ops.elementwise.reference import widen


class FusableOperators(Operators):
    """Operators for code that torch.compile traces; the layer norm is the plain one, which it takes apart itself."""

    def gated_residual_backward(self, grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """`Operators.gated_residual_backward`."""
        wide = widen(grad)
        dgate = (wide * widen(y)).sum(dim=1, keepdim=True).sum_to_size(gate.shape)
        return (wide * gate).to(y.dtype), dgate

    def rms_norm_rope(
        self, x: Tensor, weight: Tensor, rotation: Rotation | None, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """`Operators.rms_norm_rope`."""
        wide = widen(x)
        squares = norm.sum_over_ranks(wide.square().sum(dim=-1, keepdim=True))
        rstd = torch.rsqrt(squares / norm.width + norm.eps)
        heads = (wide * rstd * widen(weight)).unflatten(-1, (-1, norm.head_dim))
        return (heads if rotation is None else _rotate(heads, *rotation)).to(x.dtype), rstd

    def rms_norm_rope_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, rotation: Rotation | None, rstd: Tensor, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """`Operators.rms_norm_rope_backward`."""
        wide, grad = widen(x), widen(grad)
        if rotation is not None:
            grad = _rotate(grad, rotation[0], -rotation[1])
        grad = grad.flatten(2)
        normed = wide * rstd
        dweight = (grad * normed).sum(dim=(0, 1)).to(weight.dtype)
        grad = grad * widen(weight)
        dot = norm.sum_over_ranks((grad * normed).sum(dim=-1, keepdim=True))
        dx = rstd * (grad - normed * dot / norm.width)
        return dx.to(x.dtype), dweight


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, T, N, K] by [T, K/2]."""
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same for all heads
    even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
