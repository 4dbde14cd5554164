"""The velocity of a whole sample is the single-device model's, on every rank of every layout."""

from typing import Any

import torch
from parity import Row
from ranks import run_ranks

from mm.activation.recompute import block_runner
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.doctor.parity import value_of
from mm.parallel.apply import DataParallelOptions, apply, apply_frozen
from mm.parallel.mesh import build_mesh
from mm.parallel.velocity import ParallelVelocity
from mm.supervise.job import Job
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel

RUN = [
    Row(Layout(4)),
    Row(Layout(4, cp_size=4, ulysses_size=2)),
    Row(Layout(4, cp_size=4), model_type="i2v"),
    Row(Layout(4, tp_size=2, cp_size=2), model_type="speedcontrol"),
    Row(Layout(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2), model_type="flf2v"),
    Row(Layout(4, tp_size=4)),
    Row(Layout(4, zero3_size=4), zero=ZeroConfig(zero3_size=4)),
    Row(Layout(4, cp_size=2, zero3_size=2), zero=ZeroConfig(zero3_size=2), model_type="i2v"),
    Row(Layout(4, tp_size=2, zero3_size=2), zero=ZeroConfig(zero3_size=2)),
]
"""Layouts of generation."""
TRAINED = [
    Row(Layout(4, pp_size=4, stages=even_stages(4, 4)), model_type="i2v", recompute=Recompute()),
    Row(Layout(4, tp_size=2, pp_size=2, vp_size=2, stages=even_stages(4, 2, 2))),
    Row(
        Layout(4, cp_size=2, ulysses_size=2, pp_size=2, stages=even_stages(4, 2)),
        recompute=Recompute(full_layers=0, keep_layers=None),
    ),
    Row(Layout(4), DataParallelOptions(True, True, True), recompute=Recompute(full_layers=0, keep_layers=None)),
    Row(Layout(4, zero3_size=2), zero=ZeroConfig(zero3_size=2)),
]
"""Layouts of training, whose model renders clips between its steps."""


def inputs(row: Row) -> ModelInputs:
    """Two samples of 45 tokens, which no number of ranks divides."""
    source, wan = torch.Generator().manual_seed(3), row.wan
    values = {
        "latents": torch.randn(2, 16, 3, 6, 10, generator=source),
        "timestep": torch.tensor([900.0, 12.5]),
        "text": torch.randn(2, 8, 16, generator=source),
    }
    shapes = wan.feature_shapes((3, 6, 10))
    features = {name: torch.randn(2, *shape, generator=source) for name, shape in shapes.items()}
    return ModelInputs(**values, features=features)


def on_one_device(row: Row) -> torch.Tensor:
    model = WanModel(row.wan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value_of(name, tuple(parameter.shape)))
        return model(inputs(row))


def largest_errors() -> list[tuple[str, float]]:
    backend, found = select("cpu"), []
    with Job(process_place(), backend.collective, backend.device, 2):
        for row in RUN + TRAINED:
            with build_mesh(row.layout, 2, "cpu") as mesh:
                where: Any = row.wan, mesh, backend
                if row in RUN:
                    parallel = apply_frozen(*where, torch.float32, value_of, row.zero)
                else:
                    runner = block_runner(row.recompute)
                    parallel = apply(*where, row.options, torch.float32, value_of, zero=row.zero, run_blocks=runner)
                velocity = ParallelVelocity(parallel)
                first, again = velocity(inputs(row)), velocity(inputs(row))
            expected = on_one_device(row)
            if not torch.equal(first, again):
                found.append((row.id, float("inf")))
            found.append((row.id, float((first - expected).abs().max() / expected.abs().max())))
    return found


def test_every_rank_has_the_velocity_of_one_device() -> None:
    for rank, errors in enumerate(run_ranks(4, largest_errors, timeout_s=200)):
        assert len(errors) == len(RUN + TRAINED), errors
        for row, error in errors:
            assert error < 2e-6, (rank, row, error)
