"""What a step with adapters sends over the data-parallel axis: the gradients of the adapters and nothing else."""

import math
from typing import Any

import pytest
import torch
from parity import WAN, Row, global_batch
from ranks import run_ranks

from mm.config.diffusion import DiffusionConfig
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout
from mm.config.place import process_place
from mm.device.backend import select
from mm.diffusion.flow import FlowMatching
from mm.doctor.parity import SETTINGS, value_of
from mm.doctor.traffic import CountTraffic, axes_of, totals
from mm.lora.layer import Adapted
from mm.lora.plan import LoRAPlan, starting_values
from mm.lora.targets import linears_of, target_linears
from mm.optim.make import make_optimizer
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.parallel.placement import whole_shapes
from mm.supervise.job import Job
from mm.train.step import train_step

ROWS = {
    "ddp": (None, DataParallelOptions()),
    "distributed optimizer": (None, DataParallelOptions(use_distributed_optimizer=True)),
    "layer-zero": (ZeroConfig(zero3_size=2), DataParallelOptions()),
}
LINEARS = linears_of(whole_shapes(WAN))
# ranks of 32: every matrix is a multiple of 128 elements, where megatron-core's buffers need no padding
PLAN = LoRAPlan(LINEARS, dict.fromkeys(target_linears(["q", "o", "ffn.2"], LINEARS), Adapted(32, 32.0)), None)


class Base:
    """A `WeightSource` as far as it is read."""

    def read(self, name: str) -> torch.Tensor:
        return value_of(name, whole_shapes(WAN)[name])


def sent_by_a_rank() -> dict[str, dict[tuple[str, str], Any]]:
    backend, found = select("cpu"), {}
    with Job(process_place(), "gloo", torch.device("cpu"), 1):
        for name, (zero, options) in ROWS.items():
            layout = Layout(2, zero3_size=zero.zero3_size if zero else None)
            with build_mesh(layout, 1, "cpu") as mesh, CountTraffic(axes_of(mesh)) as traffic:
                values = starting_values(PLAN, Base(), 0)  # type: ignore[arg-type]
                parallel = apply(
                    WAN, mesh, backend, options, torch.float32, values, zero=zero, extension=PLAN.extension()
                )
                optimizer = make_optimizer(parallel, SETTINGS)
                batches = global_batch(Row(layout).samples, 0)[mesh.dp_rank :: 2]
                for _ in range(2):
                    first = len(traffic.calls)
                    train_step(parallel, optimizer, FlowMatching(DiffusionConfig()), batches, samples=4, seed=0)
                found[name] = {key: (s.calls, s.bytes) for key, s in totals(traffic.calls[first:]).items()}
    return found


def test_only_adapters_are_reduced() -> None:
    size = 4 * PLAN.parameters
    assert PLAN.parameters < sum(map(math.prod, whole_shapes(WAN).values())) / 3
    for found in run_ranks(2, sent_by_a_rank):
        for name, sent in found.items():
            of_axis = {key[1]: values for key, values in sent.items() if key[0] == "dp_cp"}
            half = pytest.approx(size / 2)  # of two ranks each sends half in a scatter or a gather
            expected = {"all-reduce": (1, pytest.approx(size))}
            if name == "distributed optimizer":
                expected = {"reduce-scatter": (1, half), "all-gather": (1, half)}
            assert of_axis == expected, name
            if name == "layer-zero":
                assert ("zero3", "all-gather") in sent  # the frozen base, gathered
                assert ("zero3", "reduce-scatter") not in sent
