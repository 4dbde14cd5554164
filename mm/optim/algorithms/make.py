"""The optimizers that there are: the one list."""

from __future__ import annotations

from mm.config.optimizer import OptimizerName
from mm.optim.algorithms.adamw import AdamW
from mm.optim.algorithms.base import Algorithm
from mm.optim.algorithms.lion import Lion

ALGORITHMS: dict[OptimizerName, Algorithm] = {algorithm.name: algorithm for algorithm in (AdamW(), Lion())}
"""By the word of `--optimizer`."""
