"""The models that a run trains: one, or two experts of which every step trains one.

An expert is an ordinary run (`mm.config.expert_runs`). Which one a step trains is drawn by key, with the chance that a
noise level falls into its band; the samples of the step then draw theirs inside of it. So each sample goes to the
expert of its noise level, the levels are distributed as those of one model are, all ranks agree without a message, a
step is one of one model on every layout, and whoever is not trained keeps its weights, its optimizer and its count.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm.config.expert_runs import expert_name, expert_runs
from mm.config.run.experts import ExpertsSection
from mm.config.step import StepSettings
from mm.diffusion.flow import FlowMatching
from mm.errors import ResumeError
from mm.optim.host_stay import HostStay
from mm.parallel.velocity import ParallelVelocity
from mm.rng import generator
from mm.train.out_of_memory import MemoryWatch
from mm.train.run import Run
from mm.train.start import Blocks, Started, prepare_blocks, start
from mm.train.state import Progress
from mm.wan.inputs import ModelInputs

if TYPE_CHECKING:  # the samplers' library
    from mm.generate.pipeline import Velocity

logger = logging.getLogger(__name__)


class Models:
    """The models of a run, of which one is on the device where the other one waits in host memory.

    Attributes:
        started: one, or the expert for much noise and that for little. flows: the objective of each.
        stays: where each is, where one waits; else empty.
    """

    def __init__(self, run: Run, started: Sequence[Started], stays: Sequence[HostStay] = ()) -> None:
        """Take started runs; of one model its own."""
        self._experts, self._seed = run.sections.experts, run.sections.training.seed
        self.started, self.stays = tuple(started), tuple(stays)
        self.flows = tuple(FlowMatching(one.run.sections.objective) for one in started)

    @property
    def first(self) -> Started:
        """One of them, for what they have in common: mesh, backend, shape, progress."""
        return self.started[0]

    def of_step(self, step: int) -> int:
        """Index of the model that a step trains, from 1 on."""
        if self._experts is None:
            return 0
        drawn = (step - 1) // self._experts.steps_in_a_row
        number = torch.rand((), generator=generator(self._seed, "expert", drawn, 0), dtype=torch.float64)
        return 0 if float(number) < self.flows[0].chance else 1

    def here(self, index: int) -> Started:
        """A model, on the device; others leave it where they wait in host memory."""
        if self.stays:
            for other, stay in enumerate(self.stays):
                if other != index:
                    stay.leave()
            self.stays[index].enter()
        return self.started[index]

    def each(self) -> Iterator[Started]:
        """Every model in turn, on the device; begins with the one that is there."""
        away = [index for index, stay in enumerate(self.stays) if not stay.here]
        for index in [*(index for index in range(len(self.started)) if index not in away), *away]:
            yield self.here(index)

    def velocity(self) -> Velocity:
        """The velocity of the whole noise: each level is asked of its expert."""
        if self._experts is None:
            return ParallelVelocity(self.first.parallel)
        from mm.generate.experts import TwoExperts  # only here: see above

        high, low = (self._velocity(index) for index in range(2))
        return TwoExperts(high, low, self._experts.boundary)

    def _velocity(self, index: int) -> Velocity:
        def velocity(inputs: ModelInputs) -> Tensor:
            return ParallelVelocity(self.here(index).parallel)(inputs)

        return velocity


def start_models(run: Run, steps: StepSettings, memory: MemoryWatch) -> Models:
    """Build the models and their optimizers, and load what they start from; every rank calls it.

    Args:
        run: the run. steps: what its steps mean. memory: is told of everything as soon as it is there.

    Raises:
        ConfigError: CFG-049. OutOfMemoryError: MEM-001. CheckpointError: as documented where they arise.
        ResumeError: CKPT-132 for experts that stand at different steps.
    """
    blocks = prepare_blocks(run, memory)
    if run.sections.experts is None:
        return Models(run, [start(run, steps, memory, blocks)])
    return _start_experts(run, run.sections.experts, steps, memory, blocks)


def _start_experts(
    run: Run, experts: ExpertsSection, steps: StepSettings, memory: MemoryWatch, blocks: Blocks
) -> Models:
    started, stays = list[Started](), list[HostStay]()
    for one in runs_of_experts(run):
        objective = one.sections.objective
        logger.info("starting the expert %s", expert_name(objective))
        mine = steps.model_copy(update={"objective": objective.model_dump(mode="json")})
        started.append(start(one, mine, memory, blocks))
        if experts.offload:
            stays.append(HostStay(started[-1].parallel, started[-1].optimizer))
            stays[-1].leave()
            memory.pinned_host += stays[-1].host_bytes
    _require_same_progress(started)
    return Models(run, started, stays)


def runs_of_experts(run: Run) -> list[Run]:
    """The run of each expert of a run that has two."""
    sections = expert_runs(run.sections)
    saves = [one.checkpoint.save for one in sections]
    others = [tuple(Path(save) for save in saves if save not in (None, one.checkpoint.save)) for one in sections]
    return [replace(run, sections=one, beside=beside) for one, beside in zip(sections, others, strict=True)]


def _require_same_progress(started: Sequence[Started]) -> None:
    """CKPT-132: checkpoints that were named for both, of which one goes on and the other does not, or elsewhere."""
    high, low = (one.progress for one in started)
    if high == low:
        return
    words = started[0].run.sections.origins, started[1].run.sections.origins
    loads = [word["checkpoint.load"].name for word in words]
    raise ResumeError(
        "CKPT-132",
        f"The experts stand at different steps: {loads[0]} at {_told(high)}, {loads[1]} at {_told(low)}.",
        f"Name checkpoints of one step, or start from their weights alone with "
        f"{words[0]['checkpoint.weights_only'].with_value(True)}.",
    )


def _told(progress: Progress) -> str:
    return f"step {progress.step}, {progress.consumed_samples} samples"
