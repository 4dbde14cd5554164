"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101): torch's own, or megatron-core's choice of a fused one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mm.optim.algorithms.base import Algorithm, ElementState, Groups
from mm.optim.settings import UpdateSettings


class AdamW(Algorithm):
    """Two averages, of gradients and of their squares, and a count of updates for the correction of their bias."""

    name = "adamw"
    title = "AdamW"
    state = (ElementState("exp_avg"), ElementState("exp_avg_sq"))
    step_key = "adam_step"
    fused = True

    def make(self, groups: Groups, settings: UpdateSettings) -> torch.optim.Optimizer:
        """torch's."""
        if settings.adam_eps is None:
            raise ValueError("AdamW needs an epsilon")
        return torch.optim.AdamW(
            groups, lr=settings.lr, betas=settings.betas, eps=settings.adam_eps, foreach=False, fused=settings.fused
        )

    def take_over(self, made: torch.optim.Optimizer, settings: UpdateSettings) -> torch.optim.Optimizer:
        """The one that megatron-core has made: it may be Apex's or TransformerEngine's."""
        if not _counts_by_group(made):  # theirs are fused already
            for group in made.param_groups:
                group.update(fused=settings.fused, foreach=False)
        return made

    def new_state(self, inner: torch.optim.Optimizer, key: Tensor) -> dict[str, Tensor]:
        """Zeros."""
        state = super().new_state(inner, key)
        return state if _counts_by_group(inner) else {**state, "step": _count(0, key)}

    def steps_made(self, inner: torch.optim.Optimizer) -> Iterator[float]:
        """Counts of every parameter that had an update."""
        for group in inner.param_groups:
            if _counts_by_group(inner):
                yield group.get("step", 0)
                continue
            steps = [inner.state[key]["step"] for key in group["params"] if "step" in inner.state.get(key, {})]
            if steps:
                yield from torch.stack(steps).tolist()  # they are on the device: one read for all

    def set_steps_made(self, inner: torch.optim.Optimizer, count: int) -> None:
        """Set it where the optimizer reads it."""
        for group in inner.param_groups:
            if _counts_by_group(inner):
                group["step"] = count
                continue
            for key in group["params"]:
                inner.state[key]["step"] = _count(count, key)


def _count(steps: int, key: Tensor) -> Tensor:
    """The step count of a parameter, where the fused kernel reads it."""
    return torch.tensor(float(steps), dtype=torch.float32, device=key.device)


def _counts_by_group(inner: torch.optim.Optimizer) -> bool:
    """Tell whether steps are counted once a group, as Apex's and TransformerEngine's are, and not once a parameter."""
    return not isinstance(inner, torch.optim.Adam)
