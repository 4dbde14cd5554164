"""A gradient that is not finite on one rank stops every rank before any weight changes."""

import torch
from parity import SEED, SETTINGS, Row, global_batch, micro_batches, value_of
from ranks import run_ranks

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.place import place
from mm.device.backend import Backend, select
from mm.diffusion.flow import FlowMatching
from mm.errors import NumericsError
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.launch import Job
from mm.parallel.mesh import build_mesh
from mm.parallel.optimizers import make_optimizer
from mm.train.step import compute_gradients

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


def bad_step(row: Row, backend: Backend) -> tuple[bool, str, bool]:
    """Whether the loss was finite, the error's id, whether any weight changed."""
    with build_mesh(row.layout, 1, "cpu") as mesh:
        parallel = apply(row.wan, mesh, backend, row.options, torch.float32, value_of, row.zero)
        optimizer = make_optimizer(parallel, SETTINGS)
        before = [shard.master.clone() for shard in optimizer.shards]
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        flow = (FiniteLossWithoutSlope if last else FlowMatching)(DiffusionConfig())
        batches = micro_batches(row, global_batch(row.samples, 0), mesh)
        finite = torch.isfinite(torch.tensor(compute_gradients(parallel, flow, batches, SEED)))
        try:
            optimizer.step(1)
            caught = "no error"
        except NumericsError as error:
            caught = error.id
        optimizer.masters_to_model()
        changed = any(not torch.equal(a, shard.master) for a, shard in zip(before, optimizer.shards, strict=True))
        return bool(finite), caught, changed


def work() -> list[tuple[bool, str, bool]]:
    backend = select("cpu")
    with Job(place(), backend.collective, backend.device, 1):
        return [bad_step(row, backend) for row in ROWS]


def test_every_rank_stops_and_no_weight_changes() -> None:
    assert run_ranks(2, work) == [[(True, "NUM-002", False)] * len(ROWS)] * 2
