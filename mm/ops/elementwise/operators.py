"""The arithmetic of the elementwise operators, forward and backward, without autograd: a kind of device may replace it.

Everything is computed in fp32 (fp64 for fp64 inputs) and cast back to the dtype of the stream.
Shapes: B batch, T tokens, D model width, N heads of this rank, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mm.ops.elementwise.reference import widen

SumOverRanks = Callable[[Tensor], Tensor]
"""Adds up a tensor over the ranks that share a width."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, [T, K/2] fp32 each."""


def identity(x: Tensor) -> Tensor:
    """The `SumOverRanks` of a width that one rank has whole."""
    return x


class HeadNorm(NamedTuple):
    """RMSNorm over all heads of a token.

    Attributes:
        head_dim: K. eps: added to the mean square.
        width: of all heads, those of other ranks included. sum_over_ranks: adds up over the ranks that have them.
    """

    head_dim: int
    eps: float
    width: int
    sum_over_ranks: SumOverRanks = identity


class Operators:
    """Operators in torch's own functions, for every device; those for one kind of device replace methods.

    `weight`, `bias` and `gate` are fp32, [B, 1, D] or [1, 1, D]; statistics are [B, T, 1] fp32.
    """

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm(x [B, T, D]) * weight + bias in the dtype of x, the mean, and 1 / the standard deviation."""
        width = [x.shape[-1]]
        if weight.shape[0] == 1:
            out, mean, rstd = torch.native_layer_norm(widen(x), width, weight.view(-1), bias.view(-1), eps)
        else:
            normed, mean, rstd = torch.native_layer_norm(widen(x), width, None, None, eps)
            out = torch.addcmul(bias, normed, weight)
        return out.to(x.dtype), mean, rstd

    def layer_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x in its dtype, of weight and of bias in theirs."""
        wide, grad, width = widen(x), widen(grad), [x.shape[-1]]
        if weight.shape[0] == 1:
            flat = weight.view(-1)
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                grad, wide, width, mean, rstd, flat, torch.zeros_like(flat), [True, True, True]
            )
            return dx.to(x.dtype), dweight.view_as(weight), dbias.view_as(weight)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * weight, wide, width, mean, rstd, None, None, [True, False, False]
        )
        dweight = torch.sub(wide, mean).mul_(rstd).mul_(grad).sum(dim=1, keepdim=True)
        return dx.to(x.dtype), dweight, grad.sum(dim=1, keepdim=True)

    def gated_residual(self, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        """x + y * gate in the dtype of x; x and y [B, T, D]."""
        return torch.addcmul(widen(x), widen(y), gate).to(x.dtype)

    def gated_residual_backward(self, grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of y in its dtype and of gate in its; that of x is `grad`."""
        wide = widen(grad)
        # A product and a sum, not an einsum: that would become a matrix product for each of the D columns.
        dgate = (wide * widen(y)).sum(dim=1, keepdim=True).sum_to_size(gate.shape)
        return (wide * gate).to(y.dtype), dgate

    def rms_norm_rope(
        self, x: Tensor, weight: Tensor, rotation: Rotation | None, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """[B, T, N, K] in the dtype of x, and 1 / the root of the mean square; x [B, T, N*K], weight [N*K]."""
        wide = widen(x)
        squares = norm.sum_over_ranks(torch.linalg.vecdot(wide, wide).unsqueeze(-1))
        rstd = torch.rsqrt(squares / norm.width + norm.eps)
        heads = (wide * rstd).mul_(widen(weight)).unflatten(-1, (-1, norm.head_dim))
        return (heads if rotation is None else _rotate(heads, *rotation)).to(x.dtype), rstd

    def rms_norm_rope_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, rotation: Rotation | None, rstd: Tensor, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of weight in their dtypes, from that of the output, [B, T, N, K]."""
        wide, grad = widen(x), widen(grad)
        if rotation is not None:
            grad = _rotate(grad, rotation[0], -rotation[1])
        grad = grad.flatten(2)
        wide_weight = widen(weight)
        # The sums over tokens and over the width are two matrix-vector products, and both share this one.
        products = grad * wide
        dweight = (products.flatten(0, 1).t() @ rstd.flatten()).to(weight.dtype)
        dot = norm.sum_over_ranks((products @ wide_weight).unsqueeze(-1))
        dx = (
            torch.mul(grad, wide_weight, out=products)
            .mul_(rstd)
            .addcmul_(wide, dot * rstd.pow(3), value=-1 / norm.width)
        )
        return dx.to(x.dtype), dweight


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, T, N, K] by [T, K/2]."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    rotation = torch.complex(cos, sin).to(pairs.dtype).unsqueeze(1)  # the same for all heads
    return torch.view_as_real(pairs * rotation).flatten(-2)
