"""Start of a run: the model and its optimizer on the mesh, at the weights that they start from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from mm.activation.host_pool import make_offloader
from mm.activation.recompute import block_runner
from mm.config.recompute import recompute_of
from mm.config.step import StepSettings
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel
from mm.train.adapters import AdapterRun
from mm.train.build import (
    build_model,
    build_optimizer,
    describe,
    open_adapters,
    start_or_resume,
    step_shape,
    why_not_compiled,
)
from mm.train.memory_breakdown import Phase
from mm.train.out_of_memory import MemoryWatch
from mm.train.run import Run
from mm.train.state import Progress
from mm.wan.layers import BlockRunner


@dataclass(frozen=True)
class Started:
    """A run that is ready for its first step.

    Attributes:
        run: the run. steps: what its steps mean. progress: where it stands.
        parallel, optimizer: what is trained. adapters: those that are trained alone, or None.
        memory: tells what was held when memory runs out.
    """

    run: Run
    steps: StepSettings
    progress: Progress
    parallel: ParallelModel
    optimizer: Optimizer
    adapters: AdapterRun | None
    memory: MemoryWatch

    def during(self, phase: Phase | None) -> AbstractContextManager[None]:
        """Enter this around a phase: who hangs in it is named, and who runs out of memory in it."""
        return nullcontext() if phase is None else _during(self.run, self.memory, phase)


@contextmanager
def _during(run: Run, memory: MemoryWatch, phase: Phase) -> Iterator[None]:
    with run.watch.during(phase), memory.during(phase):
        yield


def memory_watch(run: Run) -> MemoryWatch:
    """The watch over this rank's memory, to be made before anything is loaded."""
    return MemoryWatch(run.sections, run.backend, run.comm.rank)


@dataclass(frozen=True)
class Blocks:
    """Way of running blocks, which all models of a run share.

    Attributes:
        run: runs those of a stage. compiled: whether each is compiled.
    """

    run: BlockRunner
    compiled: bool


def prepare_blocks(run: Run, memory: MemoryWatch) -> Blocks:
    """Decide how blocks are run, and log what the run is made of; every rank calls it.

    Args:
        run: the run. memory: is told of page-locked memory.

    Raises:
        ConfigError: CFG-049.
    """
    recompute = recompute_of(run.sections.memory)
    offloader = make_offloader(
        recompute, run.config, run.mesh, run.backend, step_shape(run), processes_of_node=run.processes_of_node
    )
    memory.pinned_host = 0 if offloader is None else offloader.memory.nbytes
    not_compiled = why_not_compiled(run)
    describe(run, recompute, offloader, not_compiled)
    return Blocks(block_runner(recompute, offloader, run.backend.model_code), not_compiled is None)


def start(run: Run, steps: StepSettings, memory: MemoryWatch, blocks: Blocks) -> Started:
    """Build the model and its optimizer, and load what they start from; every rank calls it.

    Args:
        run: the run. steps: what its steps mean. memory: is told of both as soon as they are there.
        blocks: from `prepare_blocks`.

    Raises:
        OutOfMemoryError: MEM-001. CheckpointError: as documented where they arise.
    """
    adapters = open_adapters(run)
    with _during(run, memory, "building the model"):
        parallel = build_model(run, adapters, blocks.run, blocks.compiled)
        memory.models.append((parallel, None))
        optimizer = build_optimizer(parallel, steps)
        memory.models[-1] = parallel, optimizer
    with _during(run, memory, "loading weights"):
        progress = start_or_resume(run, adapters, optimizer, steps)
    return Started(run, steps, progress, parallel, optimizer, adapters, memory)
