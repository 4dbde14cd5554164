"""Frozen linears whose weights are kept in eight bits, with one scale for each output channel.

W is stored as Q with W ~ s Q, s being the largest |W| of a row over the largest value of the format: 127 for int8, 448
for fp8 (e4m3). Products take Q in the dtype of their input, where every value of both formats is exact (bf16 has 8
significant bits, int8 7, e4m3 4), and multiply the result by s. s is rounded to bf16 beforehand, so that this rounds
nothing. Backward makes the temporary copy of Q again: nothing is kept in more than eight bits.

Scales are those of the whole row, so tensor-parallel ranks that have parts of a row store what one process would.

Source: per-channel absmax scaling as in Dettmers et al. 2022 (LLM.int8, arXiv 2208.07339), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm.ops.elementwise.operators import SumOverRanks

LowBit = Literal["int8", "fp8"]

SCALE = "weight_scale"
"""Name of the scales beside `weight`."""

STORED: dict[LowBit, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST: dict[LowBit, float] = {"int8": 127.0, "fp8": 448.0}


def quantise(weight: Tensor, kind: LowBit, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """A whole weight [out, in] as (Q [out, in] of the stored dtype, s [out] fp32); s is 1 where it is not scaled."""
    if not scaled:
        return weight.to(STORED[kind]), torch.ones(len(weight))
    wide = weight.float()
    scale = (wide.abs().amax(dim=1) / _LARGEST[kind]).bfloat16().float()
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    steps = (wide / scale.unsqueeze(1)).clamp(-_LARGEST[kind], _LARGEST[kind])
    return (steps.round() if kind == "int8" else steps).to(STORED[kind]), scale


def quantised(
    read: Callable[[str], Tensor], linears: Collection[str], kind: LowBit, scaled: bool = True
) -> Callable[[str], Tensor]:
    """Values of a model whose linears are in eight bits.

    Args:
        read: gives a parameter of the model without them by name. linears: module names of those in eight bits.
        kind, scaled: as for `quantise`.
    """
    last: dict[str, tuple[Tensor, Tensor]] = {}  # weight and scale of a linear are asked for one after the other

    def value_of(name: str) -> Tensor:
        module, _, attribute = name.rpartition(".")
        if module not in linears or attribute == "bias":
            return read(name)
        if module not in last:
            last.clear()
            last[module] = quantise(read(f"{module}.weight"), kind, scaled)
        return last[module][attribute == SCALE]

    return value_of


def low_bit_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] times the transpose of s Q, [..., out] in the dtype of x. Kept for backward: Q and s."""
    out: Tensor = _Product.apply(x, weight, scale)
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)).mul_(scale.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ weight.to(grad.dtype), None, None


class LowBitLinear(nn.Module):
    """A frozen linear with an 8-bit weight; `weight_scale` [out] is beside `weight` and `bias`.

    Args:
        base: the linear, whole or a rank's share, on the meta device: the values come later, from `quantise`.
        kind: of the weight.
    """

    add_up: SumOverRanks | None

    def __init__(self, base: nn.Module, kind: LowBit) -> None:
        super().__init__()
        weight, bias = base.weight, base.bias
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter):
            raise TypeError(f"{type(base).__name__} is not a linear with weight and bias")
        self.add_up = getattr(base, "add_up", None)
        self.weight = nn.Parameter(weight.new_empty(weight.shape, dtype=STORED[kind]), requires_grad=False)
        self.weight_scale = nn.Parameter(weight.new_empty(len(weight), dtype=torch.float32), requires_grad=False)
        self.bias = bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in_features] to [B, T, out_features], or [B, t, ...] of a row linear."""
        out = low_bit_product(x, self.weight, self.weight_scale)
        return (out if self.add_up is None else self.add_up(out)) + self.bias
