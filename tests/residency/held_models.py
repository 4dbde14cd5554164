"""Tiny models whose weights lie where a plan says, and their values."""

from typing import Any

import torch
from torch import Tensor

from mm.config.model import WanConfig, of_task
from mm.config.tasks.vace import VACE
from mm.device.backend import select
from mm.residency.hold import HeldWeights, WeightValues, hold_weights
from mm.residency.plan import WeightPlan
from mm.wan.model import WanModel

TINY = WanConfig(text_dim=8, text_len=4, hidden_size=32, ffn_dim=48, num_heads=4, num_layers=6, freq_dim=16)
WITH_SIDES = of_task(TINY, VACE, vace_layers=(0, 2, 3))
"""Nine blocks in the order in which they run: side 0, 0, 1, side 2, 2, side 3, 3, 4, 5."""
SIZE = (2, 6, 8)


def write(name: str, target: Tensor) -> None:
    """Normal numbers, so that no part of a block adds nothing."""
    target.copy_(0.2 * torch.randn(target.shape, generator=torch.Generator().manual_seed(hash_of(name))))


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "little") % 2**62


def held(wan: WanConfig, plan: WeightPlan, **more: Any) -> tuple[WanModel, HeldWeights]:
    with torch.device("meta"):
        model = WanModel(wan).requires_grad_(False)
    values = more.pop("values", WeightValues(write, write))
    return model, hold_weights(model, plan, select("cpu"), values, **more)


def plain(wan: WanConfig) -> WanModel:
    model = WanModel(wan).requires_grad_(False)
    for name, parameter in model.named_parameters():
        write(name, parameter)
    return model


def inputs(wan: WanConfig, seed: int = 0) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    given = {
        "latents": torch.randn(1, wan.noise_channels, *SIZE, generator=source),
        "timestep": torch.rand(1, generator=source) * 1000,
        "text": torch.randn(1, 4, 8, generator=source),
    }
    features = {n: torch.randn(1, *shape, generator=source) for n, shape in wan.feature_shapes(SIZE).items()}
    return given | features
