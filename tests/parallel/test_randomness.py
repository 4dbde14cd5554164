"""Noise and timesteps belong to the sample: the same on every rank of every layout, different for different samples.

Every draw of real steps is hashed where it is made, on four gloo processes, and compared with what the plain loop of
one process draws.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import parity
import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from mm.config.diffusion import DiffusionConfig
from mm.config.layout import Layout, even_stages
from mm.config.model import WanConfig
from mm.config.place import process_place
from mm.device.backend import Backend, select
from mm.diffusion.flow import FlowMatching
from mm.doctor import parity as comparison
from mm.parallel.apply import DataParallelOptions, apply
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train.step import compute_gradients

PROCESSES, STEPS, SEEDS = 4, 2, (5, 6)
SAMPLES = [f"clip {index}" for index in range(parity.GLOBAL_BATCH)]
WAN = WanConfig(text_dim=16, text_len=8, hidden_size=96, ffn_dim=96, num_heads=12, num_layers=1, freq_dim=32)

ROWS = [
    parity.Row(Layout(4)),
    parity.Row(Layout(4), micro_batch_size=2),
    parity.Row(Layout(4, tp_size=4)),
    parity.Row(Layout(4, tp_size=2, sequence_parallel=True)),
    parity.Row(Layout(4, cp_size=4, ulysses_size=2)),
    parity.Row(Layout(4, cp_size=2)),
    parity.Row(Layout(4, pp_size=4, stages=even_stages(4, 4))),
    parity.Row(Layout(4, pp_size=2, vp_size=2, stages=even_stages(4, 2, 2))),
    parity.Row(Layout(4, pp_size=2, stages=even_stages(4, 2), cp_size=2, ulysses_size=2)),
]
EVERY_DAY = [ROWS[0], ROWS[3], ROWS[4], ROWS[7], ROWS[8]]
"""Every axis; the others are nightly."""
every_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id, marks=[] if row in EVERY_DAY else [pytest.mark.nightly]) for row in ROWS]
)

Key = tuple[str, int, str, int]
"""(stream, seed, sample, draw)."""

Hashes = dict[Key, set[str]]
"""The different values that were drawn for a key: there must be one."""


@contextmanager
def hashing() -> Iterator[Hashes]:
    """Hashes of everything that `FlowMatching` draws inside the block."""
    hashes: Hashes = defaultdict(set)
    draw_noise, draw_timesteps = FlowMatching.draw_noise, FlowMatching.draw_timesteps

    def note(stream: str, seed: int, samples: Any, draws: Any, values: Tensor) -> None:
        for sample, draw, value in zip(samples, draws, values, strict=True):
            assert value.dtype == torch.float32
            hashes[stream, seed, sample, draw].add(hashlib.sha256(value.numpy().tobytes()).hexdigest())

    def noise(self: FlowMatching, seed: int, samples: Any, draws: Any, shape: Any) -> Tensor:
        values = draw_noise(self, seed, samples, draws, shape)
        note("noise", seed, samples, draws, values)
        return values

    def timesteps(
        self: FlowMatching, seed: int, samples: Any, draws: Any, places: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        values = draw_timesteps(self, seed, samples, draws, places)
        note("timestep", seed, samples, draws, torch.stack(values, dim=1))
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMatching, "draw_noise", noise)
        patch.setattr(FlowMatching, "draw_timesteps", timesteps)
        yield hashes


def draw_on_this_rank(every_day: bool) -> dict[str, tuple[dict[str, int], Hashes]]:
    """Coordinates and hashes of this rank under the rows of every day, or under the others."""
    backend, found = select("cpu"), {}
    with Job(process_place(), backend.collective, backend.device, 2):
        for row in (row for row in ROWS if (row in EVERY_DAY) == every_day):
            found[row.id] = run_row(row, backend)
    return found


def run_row(row: parity.Row, backend: Backend) -> tuple[dict[str, int], Hashes]:
    with build_mesh(row.layout, 2, "cpu") as mesh, hashing() as hashes:
        wan = WAN.model_copy(update={"num_layers": row.wan.num_layers})
        parallel = apply(wan, mesh, backend, DataParallelOptions(), torch.float32, comparison.value_of)
        flow = FlowMatching(flow_config())
        for seed in SEEDS:
            for step in range(STEPS):
                batches = parity.micro_batches(row, parity.global_batch(parity.EVEN, step), mesh)
                compute_gradients(parallel, flow, batches, seed)
    return {"dp": mesh.dp_rank, "pp": mesh.pp_rank}, dict(hashes)


def flow_config() -> DiffusionConfig:
    """Continuous noise levels: on the grid of a thousand two samples may have the same."""
    return DiffusionConfig(timestep_sampling="logit_normal")


@pytest.fixture(scope="module")
def one_process() -> Hashes:
    """What the parity matrix's plain loop draws."""
    with pytest.MonkeyPatch.context() as patch, hashing() as hashes:
        patch.setattr(comparison, "STEPS", STEPS)
        for seed in SEEDS:
            patch.setattr(comparison, "SEED", seed)
            comparison.run_on_one_device(WAN, parity.SIZES[parity.EVEN], parity.GLOBAL_BATCH, objective=flow_config())
    return dict(hashes)


@cache
def ranks(every_day: bool) -> list[dict[str, tuple[dict[str, int], Hashes]]]:
    return run_ranks(PROCESSES, draw_on_this_rank, every_day, timeout_s=240)


def test_one_process_draws_anew_for_every_sample_step_and_seed(one_process: Hashes) -> None:
    expected = {
        (stream, seed, sample, step)
        for stream in ("noise", "timestep")
        for seed in SEEDS
        for sample in SAMPLES
        for step in range(STEPS)
    }
    assert one_process.keys() == expected
    values = [value for drawn in one_process.values() for value in drawn]
    assert len(values) == len(set(values)) == len(expected)


@every_row
def test_every_rank_draws_what_one_process_draws(row: parity.Row, one_process: Hashes) -> None:
    for rank in ranks(row in EVERY_DAY):
        _, hashes = rank[row.id]
        assert hashes == {key: one_process[key] for key in hashes}


@every_row
def test_every_rank_draws_for_its_samples_and_no_others(row: parity.Row) -> None:
    """Ranks that share samples draw for the same ones; replicas share none. Only the pipeline's ends need noise."""
    for rank in ranks(row in EVERY_DAY):
        coordinates, hashes = rank[row.id]
        ends = coordinates["pp"] in (0, row.layout.pp_size - 1)
        mine = SAMPLES[coordinates["dp"] :: row.layout.dp_size]
        assert hashes.keys() == {
            (stream, seed, sample, step)
            for stream in (["noise", "timestep"] if ends else ["timestep"])
            for seed in SEEDS
            for sample in mine
            for step in range(STEPS)
        }
