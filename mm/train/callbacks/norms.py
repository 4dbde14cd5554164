"""Norms of each parameter and of its gradient (`--log-norms-interval`)."""

from __future__ import annotations

from collections.abc import Sequence

from mm.config.expert_runs import expert_name
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.records import ParameterNorms, Record


class Norms(Callback):
    """Tells where in the model gradients and weights are large, whatever layout has them in parts."""

    def __init__(self, interval: int) -> None:
        """Measure every so many steps."""
        self.every = Every(interval)

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Add up what ranks own of the weights; the gradients' part was told in the step, before they were clipped."""
        started = done.models.started[done.index]
        names = list(started.parallel.trained)
        kinds = (done.result.statistics.squares, started.optimizer.weight_squares())
        gradients, weights = (dict(zip(names, squares.sqrt().tolist(), strict=True)) for squares in kinds)
        expert = expert_name(started.run.sections.objective) if len(done.models.started) > 1 else ""
        return [ParameterNorms(done.step, gradients, weights, expert)]
