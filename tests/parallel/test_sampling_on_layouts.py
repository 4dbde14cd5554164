"""Steps that TeaCache leaves out, in windows over frames: latents of every layout are those of one device."""

from typing import Any

import pytest
import torch
from parity import Row
from ranks import run_ranks

from mm.activation.recompute import block_runner
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.device.backend import select
from mm.diffusion.samplers import make_sampler
from mm.doctor.parity import value_of
from mm.generate.pipeline import Velocity, denoise
from mm.generate.tea_cache import TeaCache, TeaCacheSettings
from mm.generate.windows import Windowed, WindowSettings
from mm.parallel.agree import agreement
from mm.parallel.apply import DataParallelOptions, apply, apply_frozen
from mm.parallel.mesh import build_mesh
from mm.parallel.velocity import ParallelVelocity
from mm.supervise.job import Job
from mm.wan.model import WanModel

STEPS, THRESHOLD = 8, 1e4
"""Random weights differ far more from step to step than those of a model."""
ON_TWO = [
    Row(Layout(2, cp_size=2, ulysses_size=2), model_type="i2v"),
    Row(Layout(2, cp_size=2)),
    Row(Layout(2, tp_size=2, sequence_parallel=True)),
    Row(Layout(2, zero3_size=2), zero=ZeroConfig(zero3_size=2)),
]
ON_FOUR = [
    Row(Layout(4, cp_size=2, zero3_size=2), zero=ZeroConfig(zero3_size=2), model_type="speedcontrol"),
    Row(Layout(4, tp_size=2, pp_size=2, vp_size=2, stages=even_stages(4, 2, 2))),
]
"""The last is a layout of training, whose model renders clips between its steps."""


def latents_of(model: Velocity, row: Row, reuse: TeaCache) -> torch.Tensor:
    """One clip of 45 tokens, which no number of ranks divides, or 30 in each of two windows."""
    source, wan = torch.Generator().manual_seed(3), row.wan
    latents = torch.randn(1, 16, 3, 6, 10, generator=source)
    text, negative = torch.randn(2, 1, 8, 16, generator=source)
    shapes = wan.feature_shapes((3, 6, 10))
    features = {name: torch.randn(1, *shape, generator=source) for name, shape in shapes.items()}
    windowed = Windowed(model, wan, WindowSettings(2, 1))
    sampler = make_sampler("euler", STEPS, 3.0)
    return denoise(windowed, latents, text, negative, sampler, 3.0, features=features, reuse_at=reuse.at)


def tea_cache(agree: Any = bool) -> TeaCache:
    return TeaCache(TeaCacheSettings(THRESHOLD, "Wan2.1-I2V-14B-720P"), STEPS, agree)


def on_one_device(row: Row) -> tuple[torch.Tensor, TeaCache]:
    model, reuse = WanModel(row.wan), tea_cache()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value_of(name, tuple(parameter.shape)))
    return latents_of(model, row, reuse), reuse


def compared(rows: list[Row]) -> list[tuple[str, float, list[int]]]:
    backend, found = select("cpu"), []
    with Job(process_place(), backend.collective, backend.device, 2):
        for row in rows:
            with build_mesh(row.layout, 2, "cpu") as mesh:
                where: Any = row.wan, mesh, backend
                if row.layout.pp_size == 1:
                    parallel = apply_frozen(*where, torch.float32, value_of, row.zero)
                else:
                    runner = block_runner(row.recompute)
                    options = DataParallelOptions()
                    parallel = apply(*where, options, torch.float32, value_of, zero=row.zero, run_blocks=runner)
                reuse = tea_cache(agreement(mesh, backend.device))
                latents = latents_of(ParallelVelocity(parallel), row, reuse)
            expected, alone = on_one_device(row)
            parts = row.layout.vp_size  # each decides by itself
            counts = [reuse.computed // parts, reuse.skipped // parts, alone.computed, alone.skipped]
            found.append((row.id, float((latents - expected).abs().max() / expected.abs().max()), counts))
    return found


@pytest.mark.parametrize(
    ("ranks", "rows"), [(2, ON_TWO), pytest.param(4, ON_FOUR, marks=pytest.mark.nightly)], ids=["2", "4"]
)
def test_latents_are_those_of_one_device(ranks: int, rows: list[Row]) -> None:
    for results in run_ranks(ranks, compared, rows, timeout_s=200):
        assert [name for name, _, _ in results] == [row.id for row in rows]
        for name, error, (computed, skipped, alone, left_out) in results:
            assert error < 1e-5, (name, error)
            assert (computed, skipped) == (alone, left_out), name
            assert alone > 8 and left_out >= 8, name  # prompts and windows of the first and the last step are 8


def agreed() -> list[bool]:
    """What four ranks decide of which the third alone would run its blocks."""
    backend, layout = select("cpu"), Layout(4, zero3_size=2)
    with Job(process_place(), backend.collective, backend.device, 2), build_mesh(layout, 2, "cpu") as mesh:
        agree = agreement(mesh, backend.device)
        return [agree(True), agree(mesh.dp_rank != 2), agree(False)]


@pytest.mark.nightly
def test_replicas_of_layer_zero_take_the_same_branch() -> None:
    assert run_ranks(4, agreed) == [[True, False, False]] * 4
