"""Callbacks, which act around the steps of a run, and never inside one.

A step is closed: data, forward, backward, update (`mm.train.closed_step`). A callback sees the step when it is done,
says how often it wants to be called and whether all ranks must call it, and hands back what it has measured. It may end
the run by raising; it changes no weight, no gradient, no optimizer state and no sample of a step to come.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from mm.data.packed import MicroBatch
from mm.parallel.apply import ParallelModel
from mm.train.memory_breakdown import Phase
from mm.train.models import Models
from mm.train.records import Record
from mm.train.state import Progress
from mm.train.step import StepResult


@dataclass(frozen=True)
class Every:
    """Steps after which a callback is called.

    Attributes:
        steps: after each step whose number divides by it; None for none of these.
        at_end: after the run's last step too. when_stopping: after the step at whose end a signal ends the run, too.
    """

    steps: int | None = None
    at_end: bool = False
    when_stopping: bool = False

    def is_due(self, step: int, *, last: bool, stopping: bool = False) -> bool:
        """Tell whether to call after a step, from 1."""
        interval = self.steps is not None and step % self.steps == 0
        return interval or (self.at_end and last) or (self.when_stopping and stopping)


@dataclass(frozen=True)
class StepDone:
    """A step that is over, as callbacks see it.

    Attributes:
        progress: how far the run has come with it.
        models: all that are trained, as they are now, to be read. index: which of them the step has trained.
        result: loss, gradients' norms, rate. batches: this replica's micro-batches.
        tokens: video tokens of each sample of the step, in all replicas, after patching.
        seconds: wall time, with the wait for the data.
        last: whether the run is at its end.
    """

    progress: Progress
    models: Models
    index: int
    result: StepResult
    batches: Sequence[MicroBatch]
    tokens: Sequence[int]
    seconds: float
    last: bool

    @property
    def parallel(self) -> ParallelModel:
        """The model that the step has trained."""
        return self.models.started[self.index].parallel

    @property
    def step(self) -> int:
        """Number of the step, from 1."""
        return self.progress.step

    @property
    def stopping(self) -> bool:
        """True once a signal has reached any process; the same on every rank."""
        return self.result.statistics.asked_to_stop


class Callback(abc.ABC):
    """Action after steps.

    Attributes:
        every: how often.
        collective: every rank calls it, at the same steps, and may exchange messages; else rank 0 alone does.
        phase: what the watch and an error about memory call its time; None where it takes none worth naming.
    """

    every: Every
    collective: bool = True
    phase: Phase | None = None

    def is_due(self, done: StepDone) -> bool:
        """Tell whether to call it after a step; the same on every rank."""
        return self.every.is_due(done.step, last=done.last, stopping=done.stopping)

    @abc.abstractmethod
    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Act on a step; what is returned goes to the sinks (of rank 0)."""

    def begin(self) -> None:  # noqa: B027  most leave nothing
        """Make up for what a run that ended between two callbacks has left out; called on rank 0, before the first step
        and also where none is left, while nobody else writes into the run's folder.
        """

    def finish(self) -> None:  # noqa: B027  most have nothing going on
        """Complete what is still going on; called after the run's last step."""


class ModelCheck(Callback):
    """A callback that looks at the model as it is after a step, for long, and leaves something that is there or not.

    A run that is asked to stop does not wait for it, and one that is asked meanwhile stops at its end. Between saving
    and looking a run may be stopped otherwise; the run that goes on from that step makes up for it.
    """

    phase = "evaluation and validation"

    @abc.abstractmethod
    def look(self, models: Models, step: int) -> Sequence[Record]:
        """Look at the models after a step; every rank calls it."""

    @abc.abstractmethod
    def is_missing(self, step: int) -> bool:
        """Notice that what `look` leaves of a step is not there; asked on rank 0 alone."""

    def is_due(self, done: StepDone) -> bool:
        """Leave it out where the run is about to stop; one that is at its end is done, not stopped."""
        return super().is_due(done) and (done.last or not done.stopping)

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """`look`."""
        return self.look(done.models, done.step)
