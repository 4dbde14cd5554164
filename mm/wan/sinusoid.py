"""Numbers as sines and cosines, the first step of embedding timesteps and what is added to them."""

from __future__ import annotations

import torch
from torch import Tensor


def timestep_sinusoid(timestep: Tensor, width: int) -> Tensor:
    """[B] timesteps (0 to 1000) to [B, width] fp32: cosines, then sines, at frequencies 10000^(-2i/width).

    In fp64: an fp32 angle near 1000 is only known to some 1e-4, which is seen in the velocity.

    Source: Vaswani et al. 2017 section 3.5, in the order [cos | sin] of the Wan weights.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = torch.outer(timestep.to(torch.float64), 10_000.0**-exponent)
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()
