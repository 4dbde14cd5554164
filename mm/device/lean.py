"""The elementwise operators of a Wan block, forward and backward by hand, saving each activation once.

Autograd would keep what every step in between made in fp32: 12 fp32 copies of the residual stream a block. These keep
their inputs as they are, in the stream's dtype, and the few statistics that are dear to compute again. The formulas
are those of the plain references in `mm.device.kernels`. Everything is computed in fp32 (fp64 for fp64 inputs) and cast
back. Shapes: B batch, T tokens, D model width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.device.kernels import widen

SumOverRanks = Callable[[Tensor], Tensor]
"""Adds up a tensor over the ranks that share a width."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, [T, K/2] fp32 each."""


def alone(x: Tensor) -> Tensor:
    """The `SumOverRanks` of a width that one rank has whole."""
    return x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias over the last dim.

    Args:
        x: [B, T, D].
        weight, bias: [B, 1, D] or [1, 1, D] in fp32; 1 + scale and shift of an adaptive norm, or a norm's own.
        eps: added to the variance.

    Returns:
        [B, T, D] in the dtype of `x`. Kept for backward: x, weight, and 8 bytes a token.
    """
    out: Tensor = _LayerNorm.apply(x, weight, bias, eps)
    return out


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate.

    Args:
        x: [B, T, D], the residual stream; y: [B, T, D], a branch's output.
        gate: [B, 1, D] in fp32.

    Returns:
        [B, T, D] in the dtype of `x`. Kept for backward: y and gate.
    """
    out: Tensor = _GatedResidual.apply(x, y, gate)
    return out


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    rotation: Rotation | None,
    head_dim: int,
    eps: float,
    width: int,
    sum_over_ranks: SumOverRanks = alone,
) -> Tensor:
    """RMSNorm over all heads, then the rotation of each head's pairs by the angles of its token.

    Args:
        x: [B, T, N*K], this rank's heads.
        weight: [N*K].
        rotation: cosine and sine of every pair's angle; None leaves heads as they are.
        head_dim: K. eps: added to the mean square.
        width: of all heads, those of other ranks included. sum_over_ranks: adds up over the ranks that have them.

    Returns:
        [B, T, N, K] in the dtype of `x`. Kept for backward: x, weight, rotation, and 4 bytes a token.
    """
    cos, sin = rotation or (None, None)
    out: Tensor = _RMSNormRope.apply(x, weight, cos, sin, head_dim, eps, width, sum_over_ranks)
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        width = [x.shape[-1]]
        if weight.shape[0] == 1:
            out, mean, rstd = torch.native_layer_norm(widen(x), width, weight.view(-1), bias.view(-1), eps)
        else:
            normed, mean, rstd = torch.native_layer_norm(widen(x), width, None, None, eps)
            out = torch.addcmul(bias, normed, weight)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        wide, grad, width = widen(x), widen(grad), [x.shape[-1]]
        if weight.shape[0] == 1:
            flat = weight.view(-1)
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                grad, wide, width, mean, rstd, flat, torch.zeros_like(flat), [True, True, True]
            )
            return dx.to(x.dtype), dweight.view_as(weight), dbias.view_as(weight), None
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * weight, wide, width, mean, rstd, None, None, [True, False, False]
        )
        dweight = (grad * (wide - mean) * rstd).sum(dim=1, keepdim=True)
        return dx.to(x.dtype), dweight, grad.sum(dim=1, keepdim=True), None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return torch.addcmul(widen(x), widen(y), gate).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, gate = ctx.saved_tensors
        wide = widen(grad)
        dgate = torch.einsum("btd,btd->bd", wide, widen(y)).unsqueeze(1).sum_to_size(gate.shape)
        return grad, (wide * gate).to(y.dtype), dgate


class _RMSNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        head_dim: int,
        eps: float,
        width: int,
        sum_over_ranks: SumOverRanks,
    ) -> Tensor:
        wide = widen(x)
        squares = sum_over_ranks(torch.linalg.vecdot(wide, wide).unsqueeze(-1))
        rstd = torch.rsqrt(squares / width + eps)
        heads = (wide * rstd * widen(weight)).unflatten(-1, (-1, head_dim))
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        ctx.width, ctx.sum_over_ranks = width, sum_over_ranks
        return (heads if cos is None or sin is None else _rotate(heads, cos, sin)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        wide = widen(x)
        grad = widen(grad)
        if cos is not None:
            grad = _rotate(grad, cos, -sin)
        grad = grad.flatten(2)
        normed = wide * rstd
        dweight = torch.einsum("btd,btd->d", grad, normed).to(weight.dtype)
        grad = grad * widen(weight)
        dot = ctx.sum_over_ranks(torch.linalg.vecdot(grad, normed).unsqueeze(-1))
        dx = rstd * torch.addcmul(grad, normed, dot, value=-1 / ctx.width)
        return dx.to(x.dtype), dweight, None, None, None, None, None, None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, T, N, K] by [T, K/2]."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    rotation = torch.complex(cos, sin).to(pairs.dtype).unsqueeze(1)  # the same for all heads
    return torch.view_as_real(pairs * rotation).flatten(-2)
