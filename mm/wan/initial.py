"""Initial weights of a Wan model, each parameter from its own random stream.

A value depends on the seed, the parameter's name and its whole shape only, so every layout starts from the same
weights: a pipeline stage asks for its own names, a tensor-parallel rank draws the whole tensor and keeps its share.

Source: the official Wan2.1 implementation's rules; patch_embedding.bias, which it leaves to PyTorch, is zero here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mm.rng import generator

_ZERO = ("head.head", "motion_controller.linear.4")
_ZERO_ENDS = (".before_proj", ".after_proj")
"""Their weights are zero. (Those of side blocks: nothing is added until they have learned.)"""

_NARROW = ("text_embedding.", "time_embedding.")
"""Their weights are normal with standard deviation 0.02; all other linears are Xavier uniform."""


def initial_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The initial value of one parameter, fp32 on the CPU.

    Args:
        name: native name, for example `blocks.0.self_attn.q.weight`.
        shape: of the whole parameter, not of a rank's share.
        seed: the run's `--seed`.
    """
    random = generator(seed, "init_weights", name, 0)
    module, _, kind = name.rpartition(".")
    if kind == "modulation":
        return torch.randn(*shape, generator=random) / math.sqrt(shape[-1])
    if kind in ("bias", "emb_pos") or module in _ZERO or module.endswith(_ZERO_ENDS):
        return torch.zeros(*shape)
    if len(shape) == 1:  # the weight of a norm
        return torch.ones(*shape)
    if name.startswith(_NARROW):
        return torch.randn(*shape, generator=random) * 0.02
    fan_out, fan_in = shape[0], math.prod(shape[1:])  # a patch convolution is a linear on the flattened patch
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return (torch.rand(*shape, generator=random) * 2 - 1) * bound
