"""A model and its optimizer in host memory and back: nothing changes, all that is counted moves, the device is free."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import SETTINGS, global_batch, value_of
from mm.optim.host_stay import HostStay
from mm.optim.make import make_optimizer
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.parallel.placement import whole_shapes
from mm.supervise.job import Job
from mm.train.step import train_step

WAN = WanConfig(text_dim=16, text_len=8, hidden_size=96, ffn_dim=192, num_heads=12, num_layers=2, freq_dim=32)
ROWS: dict[str, tuple[torch.dtype, bool, ZeroConfig | None]] = {
    "fp32": (torch.float32, False, None),
    "bf16": (torch.bfloat16, False, None),
    "bf16, distributed optimizer": (torch.bfloat16, True, None),
    "bf16, layer-zero": (torch.bfloat16, False, ZeroConfig(zero3_size=2)),
}


def state(parallel: Any, optimizer: Any) -> list[torch.Tensor]:
    """Everything that both keep."""
    kept = [value for shard in optimizer.shards for value in (shard.master, *shard.inner.state[shard.key].values())]
    model = [getattr(p, "_local_tensor", p) for p in parallel.all_parameters().values()]
    tables = [table for stage in parallel.stages for table in stage.model.buffers()]
    return [*kept, *model, *tables, *optimizer.average.values.values()]


def size_of(tensors: list[torch.Tensor]) -> int:
    """Bytes behind them, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def stays_of_a_rank() -> list[tuple[int, int, int, list[bool]]]:
    """Bytes of the parameters, bytes moved out and back, bytes left on the device, and whether all is equal, by row.

    Between two steps one model stays on the host and the other does not; then each takes one more step.
    """
    found = []
    backend, flow = select("cpu"), FlowMatching(DiffusionConfig())
    with Job(process_place(), "gloo", torch.device("cpu"), 1):
        for dtype, distributed, zero in ROWS.values():
            layout = Layout(world_size=2, stages=even_stages(2, 1), zero3_size=zero.zero3_size if zero else None)
            with build_mesh(layout, 1, "cpu") as mesh:
                options = DataParallelOptions(use_distributed_optimizer=distributed)
                models = [apply(WAN, mesh, backend, options, dtype, value_of, zero=zero) for _ in range(2)]
                settings = replace(SETTINGS, ema_decay=0.9)
                both = [(model, make_optimizer(model, settings)) for model in models]
                stay = HostStay(*both[0])
                for step in range(2):
                    batch = global_batch(WAN, [(3, 4, 6)], 2, step)[mesh.dp_rank]
                    for model, optimizer in both:
                        train_step(model, optimizer, flow, [batch], samples=2, seed=1)
                    if step == 0:
                        size = size_of(state(*both[0]))
                        stay.leave()
                        left = size_of(state(*both[0]))
                        stay.enter()
                        assert stay.here and stay.host_bytes * 2 == stay.moved_bytes
                equal = [torch.equal(a, b) for a, b in zip(state(*both[0]), state(*both[1]), strict=True)]
                found.append((size, stay.moved_bytes, left, equal))
    return found


@pytest.mark.nightly
def test_a_stay_on_the_host_changes_nothing() -> None:
    elements = sum(math.prod(shape) for shape in whole_shapes(WAN).values())
    for rows in zip(ROWS, *run_ranks(2, stays_of_a_rank, timeout_s=240), strict=True):
        name, *ranks = rows
        for size, moved, left, equal in ranks:
            assert equal and all(equal), name
            assert left == 0, name
            assert moved == 2 * size > 2 * 4 * elements / 2, name
