"""Lion with decoupled weight decay (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", arXiv
2302.06675, algorithm 2): every element moves by the learning rate, in the direction of an average of gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mm.optim.algorithms.base import Algorithm, ElementState, Groups
from mm.optim.settings import UpdateSettings

_AVERAGE = "exp_avg"


class Lion(Algorithm):
    """One average of gradients; nothing depends on how many updates there were."""

    name = "lion"
    title = "Lion"
    state = (ElementState(_AVERAGE),)

    def make(self, groups: Groups, settings: UpdateSettings) -> torch.optim.Optimizer:
        """Operator by operator, with one temporary of the size of a parameter's part."""
        return _Lion(groups, {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay})


class _Lion(torch.optim.Optimizer):
    """The arithmetic, as torch's optimizers have it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not called."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state: dict[str, Any] = self.state[weight]
                    if not state:
                        state[_AVERAGE] = torch.zeros_like(weight)
                    _update(weight, weight.grad, state[_AVERAGE], group)


def _update(weight: Tensor, gradient: Tensor, average: Tensor, group: dict[str, Any]) -> None:
    """Weight -= lr (decay weight + sign(beta1 m + (1 - beta1) g)), then m = beta2 m + (1 - beta2) g, in place."""
    beta1, beta2 = group["betas"]
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    direction = average.mul(beta1).add_(gradient, alpha=1 - beta1).sign_()
    weight.add_(direction, alpha=-group["lr"])
    average.mul_(beta2).add_(gradient, alpha=1 - beta2)
