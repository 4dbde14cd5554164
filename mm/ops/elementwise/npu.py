"""Ascend NPUs: torch_npu's fused operators behind the interface of `mm.ops.elementwise.operators`.

They are called as functions without autograd, because `mm.ops.elementwise.autograd` differentiates by hand. Names,
arguments and shapes are held against the published wheel by tests/ops/test_npu_calls.py; docs/npu.md says what was
never run. Shapes: B batch, T tokens, N heads, K head width, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.ops.elementwise.operators import HeadNorm, Operators, Rotation, identity
from mm.ops.elementwise.reference import widen


class NpuOperators(Operators):
    """Operators with fused RMSNorm and rotation; LayerNorm and gates are torch's, which torch_npu implements.

    The fused operators round their result to the dtype of their input, and the rotation its tables too. They get fp32,
    so that what is rounded to the stream's dtype is rounded once, at the end, as on other devices.
    """

    def rms_norm_rope(
        self, x: Tensor, weight: Tensor, rotation: Rotation | None, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """`Operators.rms_norm_rope`."""
        wide = widen(x)
        if norm.sum_over_ranks is identity:
            normed, rstd = torch.ops.npu.npu_rms_norm(wide, widen(weight), norm.eps)
            heads = normed.unflatten(-1, (-1, norm.head_dim))
        else:  # the fused operator cannot stop between the sum of squares and its use
            heads, rstd = super().rms_norm_rope(wide, weight, None, norm)
        return (heads if rotation is None else _rotate(heads, *rotation)).to(x.dtype), rstd

    def rms_norm_rope_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, rotation: Rotation | None, rstd: Tensor, norm: HeadNorm
    ) -> tuple[Tensor, Tensor]:
        """`Operators.rms_norm_rope_backward`."""
        wide, grad = widen(x), widen(grad)
        if rotation is not None:
            grad = _rotate(grad, rotation[0], -rotation[1])
        if norm.sum_over_ranks is identity:
            dx, dweight = torch.ops.npu.npu_rms_norm_backward(grad.flatten(2), wide, widen(weight), rstd)
        else:
            dx, dweight = super().rms_norm_rope_backward(grad, wide, weight, None, rstd, norm)
        return dx.to(x.dtype), dweight.to(weight.dtype)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [B, T, N, K] by [T, K/2]; the backward turns by the negative angle, which needs no operator of its own."""
    batch = heads.shape[0]
    # Interleaved, the operator takes tables of [1, T, 1, K] alone, each number twice, and fewer than 1000 heads in all
    # samples together. As one long sample, any number of samples fits.
    cos, sin = (x.to(heads.dtype).repeat_interleave(2, -1).repeat(batch, 1)[None, :, None] for x in (cos, sin))
    turned: Tensor = torch.ops.npu.npu_rotary_mul(heads.flatten(0, 1).unsqueeze(0), cos, sin, "interleave")
    return turned.view_as(heads)
