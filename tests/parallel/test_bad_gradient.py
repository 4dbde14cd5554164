"""A gradient that is not finite on one rank stops every rank, or is skipped by all, before any weight changes."""

import math
from collections.abc import Callable

import torch
from parity import Row, global_batch, micro_batches
from ranks import run_ranks

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import Backend, select
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import SEED, SETTINGS, value_of
from mm.errors import NumericsError
from mm.optim.make import make_optimizer
from mm.optim.step_statistics import StepStatistics
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train.step import stop_at, train_step

ROWS = [
    Row(Layout(2), DataParallelOptions(use_distributed_optimizer=True)),
    Row(Layout(2, tp_size=2, sequence_parallel=True)),
    Row(Layout(2, pp_size=2, stages=((1, 2),))),
    Row(Layout(2, zero3_size=2), zero=ZeroConfig(zero3_size=2)),
]


class FiniteLossWithoutSlope(FlowMatching):
    """The root of zero is zero, and its slope is not a number."""

    def loss(self, prediction, target, weight, elements=None):
        loss, samples = super().loss(prediction, target, weight, elements)
        return loss + (0 * prediction.sum()).abs().sqrt(), samples


def bad_step(row: Row, backend: Backend, on_nonfinite: Callable[[StepStatistics], None]) -> tuple[bool, str, bool]:
    """Whether the loss was finite, what came of the step, whether any weight changed."""
    with build_mesh(row.layout, 1, "cpu") as mesh:
        parallel = apply(row.wan, mesh, backend, row.options, torch.float32, value_of, zero=row.zero)
        optimizer = make_optimizer(parallel, SETTINGS)
        before = [shard.master.clone() for shard in optimizer.shards]
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        flow = (FiniteLossWithoutSlope if last else FlowMatching)(DiffusionConfig())
        batches = micro_batches(row, global_batch(row.samples, 0), mesh)
        found: list[StepStatistics] = []

        def decide(statistics: StepStatistics) -> None:
            found.append(statistics)
            on_nonfinite(statistics)

        try:
            result = train_step(parallel, optimizer, flow, batches, samples=4, seed=SEED, on_nonfinite=decide)
            caught = f"updated: {result.updated}"
        except NumericsError as error:
            caught = error.id
        rate = optimizer.learning_rate
        optimizer.masters_to_model()
        changed = any(not torch.equal(a, shard.master) for a, shard in zip(before, optimizer.shards, strict=True))
        if caught.startswith("updated"):  # the next step goes on with nothing of the bad gradients
            result = train_step(parallel, optimizer, FlowMatching(DiffusionConfig()), batches, samples=4, seed=SEED)
            assert result.updated
            assert result.lr == rate < SETTINGS.lr
            fresh = apply(row.wan, mesh, backend, row.options, torch.float32, value_of, zero=row.zero)
            straight = make_optimizer(fresh, SETTINGS)
            straight.set_progress(4)
            train_step(fresh, straight, FlowMatching(DiffusionConfig()), batches, samples=4, seed=SEED)
            pairs = zip(optimizer.shards, straight.shards, strict=True)
            caught += f", then as never: {all(torch.equal(a.master, b.master) for a, b in pairs)}"
        return math.isfinite(found[0].loss), caught, changed


def work() -> list[list[tuple[bool, str, bool]]]:
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 1):
        return [[bad_step(row, backend, decide) for row in ROWS] for decide in (stop_at, lambda statistics: None)]


def test_every_rank_decides_alike_and_no_weight_changes() -> None:
    stopped, skipped = (True, "NUM-002", False), (True, "updated: False, then as never: True", False)
    assert run_ranks(2, work) == [[[stopped] * len(ROWS), [skipped] * len(ROWS)]] * 2
