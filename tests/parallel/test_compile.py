"""Compiled blocks: as close to the plain loop as eager ones, and recomputation still changes no bit of them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import EVEN, MIXED, Row, compare, over_limits, parallel_run, plain_run
from ranks import run_ranks
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from train.training_runs import bits, metrics, run, run_on, words

from mm.cli import train as train_command
from mm.config.layerzero import ZeroConfig
from mm.config.layout import Layout, even_stages
from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.parallel.apply import DataParallelOptions
from mm.parallel.mesh import build_mesh
from mm.supervise.job import Job
from mm.train import build
from mm.wan import compile as compiling

PLANS = {
    "none": None,
    "each": Recompute(),
    "keep": Recompute(full_layers=0, keep_layers=None, offload=True),
    "mixed": Recompute(full_layers=1, keep_layers=1, kept="q,k,v,O"),
}
OVERLAPPED = DataParallelOptions(use_distributed_optimizer=True, overlap_grad_reduce=True)
ROWS = [
    Row(Layout(4, tp_size=2, sequence_parallel=True, cp_size=2, ulysses_size=2), samples=EVEN, compiled=True),
    Row(Layout(4, zero3_size=2), zero=ZeroConfig(zero3_size=2), samples=EVEN, compiled=True),
]
PIPELINE = Row(Layout(4, pp_size=2, vp_size=2, stages=even_stages(8, 2, 2)), OVERLAPPED, samples=MIXED, compiled=True)


def compare_here(rows: list[Row], cache: str) -> list[dict[str, Any]]:
    """Of every row: what is off compared with the plain loop, which plans gave other bits, graphs of a function."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    backend, found = select("cpu"), []
    with Job(process_place(), backend.collective, backend.device, 5):
        for row in rows:
            torch.compiler.reset()
            counters.clear()
            with build_mesh(row.layout, 5, "cpu") as mesh:
                traces = {
                    name: parallel_run(replace(row, recompute=plan), mesh, backend) for name, plan in PLANS.items()
                }
            result = {"graphs": counters["stats"]["unique_graphs"]}
            if dist.get_rank() == 0:
                result["off"] = over_limits(row, compare(traces["none"], plain_run(row)))
                first = traces["none"]
                result["different"] = [
                    name
                    for name, other in traces.items()
                    if other.losses != first.losses
                    or other.norms != first.norms
                    or any(
                        not torch.equal(gradient, step[parameter])
                        for gradients, step in zip(other.gradients, first.gradients, strict=True)
                        for parameter, gradient in gradients.items()
                    )
                ]
            found.append(result)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for what torch compiles: a graph that several tests and ranks have is compiled once."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.mark.parametrize(
    ("rows", "graphs"),
    [
        # Seven, of which the two before self attention tell blocks that keep it from others.
        pytest.param([Row(Layout(1), samples=EVEN, compiled=True)], [7 + 2], id="single", marks=pytest.mark.nightly),
        # With tensor parallelism five, of which one is before self attention.
        pytest.param(ROWS, [5 + 1, 7 + 2], id="tp2sp-cp2, dp4-zero2", marks=pytest.mark.nightly),
        pytest.param(
            [Row(Layout(1), samples=MIXED, compiled=True)], [2 * (7 + 2)], id="sizes", marks=pytest.mark.nightly
        ),
        pytest.param([PIPELINE], [None], id="pp2vp2", marks=pytest.mark.nightly),
    ],
)
def test_compiled_runs(rows: list[Row], graphs: list[int | None], cache: str) -> None:
    ranks = run_ranks(rows[0].layout.world_size, compare_here, rows, cache, timeout_s=400)
    for row, expected, result in zip(rows, graphs, ranks[0], strict=True):
        assert result["off"] == {}, row.id
        assert result["different"] == [], row.id
        # No more for more blocks, samples, steps and plans: no graph is made again.
        assert expected is None or result["graphs"] == expected, row.id


def command(arguments: list[str], environment: dict[str, str]) -> list[str]:
    """What `mm train` in a process of its own says."""
    done = subprocess.run(
        [sys.executable, "-m", "mm.cli.train", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stderr.splitlines()


@pytest.mark.nightly
def test_without_a_compiler_training_goes_on(demo: Path, tmp_path: Path) -> None:
    expected = run(demo, tmp_path / "eager", train_iters=2)
    arguments = words(demo, tmp_path / "run", train_iters=2, compile_blocks=True)
    missing = {"CC": "/bin/false", "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    lines = command(arguments, missing)
    warnings = [line for line in lines if " WARNING " in line]
    assert len(warnings) == 1
    assert "No working C++ compiler" in warnings[0]
    (row,) = (line for line in lines if " INFO compile " in line)
    assert " off: " in row
    assert "No working C++ compiler" in row
    assert bits(metrics(tmp_path / "run")) == bits(expected)


def train_here(arguments: list[str], cache: str, empty_cache: str) -> str | None:
    """Rank 1 has no compiler; returns what the probe said here."""
    without = os.environ["RANK"] == "1"
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": empty_cache if without else cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    said = []

    def try_compiling(*args: Any) -> str | None:
        said.append(compiling.try_compiling(*args))
        return said[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "try_compiling", try_compiling)
        if without:
            patch.setattr(inductor_config.cpp, "cxx", (None, "/bin/false"))
        train_command.main(arguments)
    return said[0]


@pytest.mark.nightly
def test_one_rank_without_a_compiler_decides_for_all(demo: Path, tmp_path: Path, cache: str) -> None:
    run_on(2, demo, tmp_path / "eager", train_iters=2, micro_batch_size=2)
    arguments = words(demo, tmp_path / "run", train_iters=2, micro_batch_size=2, compile_blocks=True)
    said = run_ranks(2, train_here, arguments, cache, str(tmp_path / "empty"), timeout_s=300)
    assert said[0] is None
    assert "No working C++ compiler" in str(said[1])
    assert bits(metrics(tmp_path / "run")) == bits(metrics(tmp_path / "eager"))


@pytest.mark.nightly
def test_a_command_that_compiles(demo: Path, tmp_path: Path, cache: str) -> None:
    expected = run(demo, tmp_path / "eager", train_iters=2)
    arguments = words(demo, tmp_path / "run", train_iters=2, compile_blocks=True)
    lines = command(arguments, {"TORCHINDUCTOR_CACHE_DIR": cache})
    (row,) = (line for line in lines if " INFO compile " in line)
    assert row.endswith(" every block")
    assert not [line for line in lines if " WARNING " in line]
    for found, eager in zip(metrics(tmp_path / "run"), expected, strict=True):
        assert found["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-5)
