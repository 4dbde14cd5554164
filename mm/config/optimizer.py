"""The optimizers that `--optimizer` names, with their numbers where no flag says others; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["adamw", "lion"]


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of an update.

    Attributes:
        beta1, beta2: shares of what is kept of the averages of gradients. eps: None where the update has none.
    """

    beta1: float
    beta2: float
    eps: float | None


DEFAULTS: dict[OptimizerName, Hyperparameters] = {
    "adamw": Hyperparameters(0.9, 0.999, 1e-8),
    "lion": Hyperparameters(0.9, 0.99, None),
}
