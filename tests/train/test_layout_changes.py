"""Checkpoints of every layout: resumed on the same one bit for bit, on every other one as if it had always run so."""

import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import bits, metrics, run, words

from mm.cli import train as train_command

ZERO = {"layerzero": True}
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
PIPELINE = "pipeline_model_parallel_size"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4-distopt": OVERLAPPED,
    "tp2sp-cp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "context_parallel_size": 2},
    "dp2-pp2vp2": {PIPELINE: 2, "virtual_pipeline_model_parallel_size": 2},
    "cp2-zero2": {"context_parallel_size": 2, **ZERO},
    "tp4": {"tensor_model_parallel_size": 4},
    "cp4-ring": {"context_parallel_size": 4, "context_parallel_algo": "megatron_cp_algo"},
    "cp4-usp": {"context_parallel_size": 4, "context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2},
    "pp4": {PIPELINE: 4},
    "tp2-pp2": {"tensor_model_parallel_size": 2, PIPELINE: 2, "use_distributed_optimizer": True},
    "tp2-zero2": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True, **ZERO},
    "cp2-pp2-selective": {"context_parallel_size": 2, PIPELINE: 2, "recompute_granularity": "selective"},
}
CHANGING = list(LAYOUTS)[:5]
BATCH = {"micro_batch_size": 2, "global_batch_size": 8}
BEFORE, AFTER = 2, 4


def flags(name: str, zero: Path) -> dict[str, Any]:
    return {**BATCH, **LAYOUTS[name], **({"layerzero_config": zero} if "layerzero" in LAYOUTS[name] else {})}


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zero") / "zero.yaml"
    path.write_text("zero3_size: 2\n")
    return path


@pytest.mark.nightly
def test_every_layout_resumes_bit_for_bit(demo: Path, tmp_path: Path, zero: Path) -> None:
    """Four steps, and two and two, written in the background."""
    commands = []
    for name in LAYOUTS:
        for folder, steps in (("straight", AFTER), ("stopped", BEFORE), ("stopped", AFTER)):
            more = {"train_iters": steps, "async_save": folder == "stopped", "keep_latest": 1}
            commands.append(words(demo, tmp_path / folder / name, **flags(name, zero), **more))
    run_ranks(4, train_one_after_the_other, commands, timeout_s=580)
    for name in LAYOUTS:
        straight, stopped = tmp_path / "straight" / name, tmp_path / "stopped" / name
        assert bits(metrics(stopped)) == bits(metrics(straight)), name
        files = [path.name for path in sorted(straight.glob("iter_*/shard-*"))]
        assert len(files) == 4
        for file in files:
            place = Path(f"iter_{AFTER:07d}") / file
            assert (stopped / place).read_bytes() == (straight / place).read_bytes(), (name, file)


@pytest.mark.nightly
def test_every_change_of_layout_goes_on_as_if_nothing_had_happened(demo: Path, tmp_path: Path, zero: Path) -> None:
    """Five layouts' checkpoints, each gone on from by all five; and by one process, against which all are compared."""
    single = run(demo, tmp_path / "single", train_iters=AFTER, **BATCH)
    saved = [words(demo, tmp_path / name, train_iters=BEFORE, **flags(name, zero)) for name in CHANGING]
    run_ranks(4, train_one_after_the_other, saved, timeout_s=200)
    commands = []
    for before, after in product(CHANGING, CHANGING):
        folder = tmp_path / f"{before} to {after}"
        shutil.copytree(tmp_path / before, folder)
        commands.append(words(demo, folder, train_iters=AFTER, **flags(after, zero)))
    run_ranks(4, train_one_after_the_other, commands, timeout_s=580)
    worst = 0.0
    for before, after in product(CHANGING, CHANGING):
        rows = metrics(tmp_path / f"{before} to {after}")
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for ours, theirs in zip(rows, single, strict=True):
            assert ours["consumed_samples"] == theirs["consumed_samples"]
            worst = max(worst, abs(ours["loss"] / theirs["loss"] - 1))
    print(f"25 changes: losses differ from one process by at most {worst:.1e}")
    assert worst < 1e-6
