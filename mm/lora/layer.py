"""A linear with a LoRA adapter, and giving adapters to a model.

y = W x + b + (alpha / r) B A x, with W and b frozen (Hu et al. 2021, arXiv 2106.09685). A linear keeps its place and
its names: `blocks.0.self_attn.q.weight` and `.bias` stay what they were, `.lora_A` [r, in] and `.lora_B` [out, r] are
added. So whatever reads or writes a model's weights by name goes on working.

With tensor parallelism a column linear has all of A and its rows of B; a row linear has its columns of A and all of B,
and its update is added to the partial result before that is added up over the ranks: no message more than without
LoRA. The gradient of the whole half is then each rank's part of a sum (`mm.parallel.tensor.gradient_is_partial`).

Dropout is not offered: a mask that does not depend on the layout would have to be drawn for every element of every
input on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.lora.low_bit import LowBit, LowBitLinear, low_bit_product
from mm.lora.targets import Sizes
from mm.ops.elementwise.operators import SumOverRanks
from mm.rng import generator


class Adapted(NamedTuple):
    """Adaptation of one linear: r, the width between A and B, and alpha, which over r scales the update."""

    rank: int
    alpha: float


class LoRALinear(nn.Module):
    """A frozen linear and its trainable update.

    A new one's A is not meaningful until `init_adapters` or a file sets it; B is zero, so the update is too.

    Args:
        base: the linear, whole or a rank's share (`mm.wan.layers.LinearFactory`), or a `LowBitLinear` of one; its
            parameters are taken over and frozen.
        adapted: r and alpha.
    """

    add_up: SumOverRanks | None
    weight_scale: nn.Parameter | None

    def __init__(self, base: nn.Module, adapted: Adapted) -> None:
        super().__init__()
        weight, bias = base.weight, base.bias
        if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter):
            raise TypeError(f"{type(base).__name__} is not a linear with weight and bias")
        self.weight, self.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        scale = getattr(base, "weight_scale", None)
        self.weight_scale = scale if isinstance(scale, nn.Parameter) else None
        self.add_up = getattr(base, "add_up", None)
        self.scale = adapted.alpha / adapted.rank
        out_features, in_features = weight.shape
        # fp32, the dtype they are trained in, whatever the frozen weights are in
        self.lora_A = nn.Parameter(weight.new_empty(adapted.rank, in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, adapted.rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, in_features] to [B, T, out_features], or [B, t, ...] of a row linear; computed in the dtype of x."""
        if self.add_up is not None:
            return self.add_up(self._update(self._product(x), x)) + self.bias
        if self.weight_scale is not None:
            return self._update(self._product(x) + self.bias, x)
        return self._update(F.linear(x, self.weight, self.bias), x)

    def _product(self, x: Tensor) -> Tensor:
        """W x."""
        if self.weight_scale is None:
            return F.linear(x, self.weight)
        return low_bit_product(x, self.weight, self.weight_scale)

    def _update(self, out: Tensor, x: Tensor) -> Tensor:
        """out + scale B A x. For backward it keeps x, which linears of the same x share, and A x of width r."""
        narrow = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        wide = self.lora_B.to(x.dtype).t()
        return torch.addmm(out.flatten(0, -2), narrow, wide, alpha=self.scale).view_as(out)


def add_adapters(model: nn.Module, adapted: Mapping[str, Adapted]) -> list[str]:
    """Freeze a model and give linears of it adapters, in place. It may be on the meta device.

    Args:
        model: a Wan model or a pipeline stage of one.
        adapted: linears of the whole model by native module name, from `mm.lora.targets.target_linears` or from a file
            (`mm.lora.adapter`: `Adapter.adapted`, after `require_fit`). Those of blocks that this stage does not have
            are left out.

    Returns:
        Names of the new parameters, in the order of `adapted`.
    """
    model.requires_grad_(False)
    held = {name for name, _ in model.named_modules()}
    added = []
    for name, how in adapted.items():
        if ".".join(name.split(".")[:2]) not in held:
            continue
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).add_module(child, LoRALinear(model.get_submodule(name), how))
        added += [f"{name}.lora_A", f"{name}.lora_B"]
    return added


def keep_in_low_bits(model: nn.Module, linears: Iterable[str], kind: LowBit) -> None:
    """Replace linears of a model by `LowBitLinear`, in place; before `add_adapters`.

    Args:
        model: a Wan model or a pipeline stage of one, on the meta device.
        linears: of the whole model by native module name; those of blocks that this stage does not have are left out.
        kind: of the weights.
    """
    held = {name for name, _ in model.named_modules()}
    for name in linears:
        if name in held:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent).add_module(child, LowBitLinear(model.get_submodule(name), kind))


def adapter_shapes(linears: Mapping[str, Sizes], adapted: Mapping[str, Adapted]) -> dict[str, tuple[int, int]]:
    """Whole shapes of the parameters that `add_adapters` adds, by native name.

    Args:
        linears: of the whole model, from `mm.lora.targets.linears_of`.
        adapted: which of them, and how.
    """
    shapes = {}
    for name, how in adapted.items():
        out_features, in_features = linears[name]
        shapes[f"{name}.lora_A"] = (how.rank, in_features)
        shapes[f"{name}.lora_B"] = (out_features, how.rank)
    return shapes


def is_adapter(name: str) -> bool:
    """Tell whether the parameter of this native name is half of an adapter."""
    return name.endswith((".lora_A", ".lora_B"))


def initial_adapter_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of half of an adapter, fp32 on the CPU: B is zero, A Kaiming uniform, PEFT's default.

    Args:
        name: native name, for example `blocks.0.self_attn.q.lora_A`.
        shape: of the whole parameter, not of a rank's share.
        seed: the run's `--seed`.
    """
    value = torch.zeros(*shape)
    if name.endswith(".lora_A"):
        nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator(seed, "init_weights", name, 0))
    return value


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Fill all adapters with `initial_adapter_value`; they must be whole, not sharded."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.copy_(initial_adapter_value(name, parameter.shape, seed))
