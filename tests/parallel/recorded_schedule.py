"""Pipeline schedules as megatron-core really runs them: recorded on gloo ranks, replayed with unit times.

Recorded is the order in which each rank does its forwards and backwards. Replayed, the forward of a block takes one
unit and its backward two, messages take none, and an event starts as soon as its rank and what it needs are ready: the
makespan then shows the bubble of the schedule itself, which the noise of a real clock would hide.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import parity
import pytest
import torch
from megatron.core.pipeline_parallel import schedules
from ranks import run_ranks

from mm.config.diffusion import DiffusionConfig
from mm.config.layout import Layout, Stages
from mm.config.place import process_place
from mm.device.backend import Backend, select
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import SEED, value_of
from mm.parallel.apply import DataParallelOptions, ParallelModel, apply
from mm.parallel.mesh import Mesh, build_mesh
from mm.supervise.job import Job
from mm.train.step import compute_gradients

FORWARD, BACKWARD = 1, 2
"""Units of time that a block takes."""


@dataclass(frozen=True)
class Case:
    """A pipeline: blocks of each virtual stage, [vp_size][pp_size], and the micro-batches of a step."""

    stages: Stages
    num_microbatches: int

    @property
    def pp_size(self) -> int:
        return len(self.stages[0])

    @property
    def vp_size(self) -> int:
        return len(self.stages)

    @property
    def blocks(self) -> list[int]:
        """Blocks of the virtual stages, in the order in which a sample passes them."""
        return [size for row in self.stages for size in row]

    @property
    def name(self) -> str:
        """Such as `pp4vp2-m8`."""
        return f"{self.layout(self.pp_size).name()}-m{self.num_microbatches}"

    def layout(self, world_size: int) -> Layout:
        return Layout(world_size, pp_size=self.pp_size, vp_size=self.vp_size, stages=self.stages)


@dataclass(frozen=True)
class Event:
    """The forward or backward of one micro-batch through one virtual stage."""

    kind: Literal["F", "B"]
    micro_batch: int
    stage: int


Orders = list[list[Event]]
"""The events of each pipeline rank, in the order in which it does them."""


def record(world_size: int, cases: Sequence[Case]) -> dict[str, Orders]:
    """One step of every case on `world_size` processes; the orders of the first replica, by the case's name."""
    by_rank = run_ranks(world_size, _record_here, world_size, cases, timeout_s=240)
    return {case.name: [found[case.name] for found in by_rank if case.name in found] for case in cases}


def _record_here(world_size: int, cases: Sequence[Case]) -> dict[str, list[Event]]:
    backend, found = select("cpu"), {}
    with Job(process_place(), backend.collective, backend.device, 2):
        for case in cases:
            with build_mesh(case.layout(world_size), 2, "cpu") as mesh, recording(mesh) as events:
                one_step(new_model(mesh, backend), parity.EVEN, case.num_microbatches)
            if mesh.dp_rank == 0:
                found[case.name] = events
    return found


def new_model(mesh: Mesh, backend: Backend) -> ParallelModel:
    return apply(parity.Row(mesh.layout).wan, mesh, backend, DataParallelOptions(), torch.float32, value_of)


def one_step(parallel: ParallelModel, samples: str, num_microbatches: int) -> None:
    """Forward and backward of the same micro-batches on every replica."""
    steps = range(-(-num_microbatches // parity.GLOBAL_BATCH))
    batches = [batch for step in steps for batch in parity.global_batch(samples, step)]
    compute_gradients(parallel, FlowMatching(DiffusionConfig()), batches[:num_microbatches], SEED)


@contextlib.contextmanager
def recording(mesh: Mesh) -> Iterator[list[Event]]:
    """The forwards and backwards of the schedules that run inside the block."""
    events: list[Event] = []
    forward, backward = schedules.forward_step, schedules.backward_step
    under_way: dict[int, tuple[Any, int, int]] = {}  # by id of the output, which lives until its backward

    def record_forward(*args: Any, **kwargs: Any) -> Any:
        output, num_tokens = forward(*args, **kwargs)
        micro_batch = kwargs["current_microbatch"]
        stage = (kwargs.get("vp_stage") or 0) * mesh.layout.pp_size + mesh.pp_rank
        events.append(Event("F", micro_batch, stage))
        under_way[id(_tensor(output))] = (_tensor(output), micro_batch, stage)
        return output, num_tokens

    def record_backward(received: Any, output: Any, *rest: Any) -> Any:
        _, micro_batch, stage = under_way.pop(id(_tensor(output)))
        events.append(Event("B", micro_batch, stage))
        return backward(received, output, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "forward_step", record_forward)
        patch.setattr(schedules, "backward_step", record_backward)
        yield events
    assert not under_way, f"forwards without a backward: {len(under_way)}"


def _tensor(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def replay(orders: Orders, blocks: Sequence[int]) -> int:
    """Time until the last rank is done.

    Args:
        orders: by pipeline rank.
        blocks: of each virtual stage.

    Raises:
        ValueError: when the ranks wait for each other for ever.
    """
    ends: dict[Event, int] = {}
    clocks, waiting = [0] * len(orders), [list(reversed(order)) for order in orders]
    while any(waiting):
        before = len(ends)
        for rank, queue in enumerate(waiting):
            while queue and (ready := _ready_at(queue[-1], ends, len(blocks))) is not None:
                event = queue.pop()
                duration = blocks[event.stage] * (FORWARD if event.kind == "F" else BACKWARD)
                clocks[rank] = ends[event] = max(clocks[rank], ready) + duration
        if len(ends) == before:
            raise ValueError(f"the ranks wait for each other: {[queue[-1:] for queue in waiting]}")
    return max(clocks)


def _ready_at(event: Event, ends: dict[Event, int], num_stages: int) -> int | None:
    """When everything that the event needs has ended; None when some of it has not run."""
    kind, micro_batch, stage = event.kind, event.micro_batch, event.stage
    if kind == "F":
        needs = [Event("F", micro_batch, stage - 1)] if stage > 0 else []
    else:
        needs = [Event("F", micro_batch, stage)]
        needs += [Event("B", micro_batch, stage + 1)] if stage + 1 < num_stages else []
    if any(need not in ends for need in needs):
        return None
    return max((ends[need] for need in needs), default=0)


def bubble(case: Case, orders: Orders) -> Fraction:
    """Share of the step, over all ranks, in which a rank does nothing."""
    work = case.num_microbatches * sum(case.blocks) * (FORWARD + BACKWARD)
    return 1 - Fraction(work, case.pp_size * replay(orders, case.blocks))


def even_bubble(case: Case) -> Fraction:
    """(p - 1) / (v m + p - 1) (Narayanan et al. 2021, arXiv 2104.04473, section 2.2, as a share of the whole step)."""
    p = case.pp_size
    return Fraction(p - 1, case.vp_size * case.num_microbatches + p - 1)


def slowest_stage_time(case: Case) -> int:
    """Time of a step without interleaving whose stages are uneven, when the slowest stage is the last one.

    One micro-batch passes all stages there and back; the slowest stage, which never waits, adds its work for each of
    the others. Where the slowest stage is not the last one this is an upper bound: a stage further back that is faster
    than its share of the round trip leaves room.
    """
    return (FORWARD + BACKWARD) * (sum(case.blocks) + (case.num_microbatches - 1) * max(case.blocks))


def peak_in_flight(order: Sequence[Event]) -> int:
    """Most forwards whose backward has not begun, over virtual stages: what a rank keeps activations for."""
    peak = live = 0
    for event in order:
        live += 1 if event.kind == "F" else -1
        peak = max(peak, live)
    return peak
