"""The elementwise operators of a Wan block, forward and backward by hand, saving each activation once.

Autograd would keep what every step in between made in fp32: 12 fp32 copies of the residual stream a block. These keep
their inputs as they are, in the stream's dtype, and the few statistics that are dear to compute again. The formulas
are those of the plain references beside (`reference`). Everything is computed in fp32 (fp64 for fp64 inputs) and cast
back; `operators` has the arithmetic, `dispatch` knows which devices have their own.
Shapes: B batch, T tokens, D model width, N heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.ops.elementwise.dispatch import operators_of
from mm.ops.elementwise.operators import HeadNorm, Rotation


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


def rms_norm_rope(x: Tensor, weight: Tensor, rotation: Rotation | None, norm: HeadNorm) -> Tensor:
    """RMSNorm over all heads, then the rotation of each head's pairs by the angles of its token.

    Args:
        x: [B, T, N*K], this rank's heads.
        weight: [N*K].
        rotation: cosine and sine of every pair's angle; None leaves heads as they are.
        norm: the width and what else the norm needs.

    Returns:
        [B, T, N, K] in the dtype of `x`. Kept for backward: x, weight, rotation, and 4 bytes a token.
    """
    cos, sin = rotation or (None, None)
    out: Tensor = _RMSNormRope.apply(x, weight, cos, sin, norm)
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, rstd = operators_of(x).layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *operators_of(grad).layer_norm_backward(grad, *ctx.saved_tensors), None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(y, gate)
        return operators_of(x).gated_residual(x, y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *operators_of(grad).gated_residual_backward(grad, *ctx.saved_tensors)


class _RMSNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, norm: HeadNorm) -> Tensor:
        rotation = None if cos is None or sin is None else (cos, sin)
        out, rstd = operators_of(x).rms_norm_rope(x, weight, rotation, norm)
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        ctx.norm = norm
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        rotation = None if cos is None else (cos, sin)
        dx, dweight = operators_of(grad).rms_norm_rope_backward(grad, x, weight, rotation, rstd, ctx.norm)
        return dx, dweight, None, None, None
