"""`mm train --pack`: images, short and long clips in sequences of a token budget, against the same one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_store import LONGEST, write_mixed
from ranks import run_ranks
from training_runs import bits, metrics, run, words

from mm.checkpoint.weights import open_weights
from mm.cli import train as train_command
from mm.errors import ConfigError, DataError

BATCH = {"micro_batch_size": 1, "global_batch_size": 8}
STEPS = 4
BUDGET = 100
EXACT = {"lr": 1e-2, "adam_eps": 1e-2, "clip_grad": 0.3}
"""A small epsilon would turn the rounding of gradients near zero into steps as large as any."""
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "cp2": {"context_parallel_size": 2},
    "ring2": {
        "context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo", "recompute_granularity": "selective",
        "mm_model": "offloading.json",
    },
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": PIPELINE,
    "pp2vp2": {**PIPELINE, "virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full",
               "recompute_method": "uniform"},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags that name the features of all kinds."""
    folder = tmp_path_factory.mktemp("mixed")
    files = {"mm_data": write_mixed(demo, folder), "mm_model": demo / "configs" / "pretrain_model.json"}
    return {**files, **EXACT, **BATCH}


@pytest.fixture(scope="module")
def plain(demo: Path, mixed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run of one process that packs nothing."""
    folder = tmp_path_factory.mktemp("plain")
    run(demo, folder, **mixed, train_iters=STEPS, save_interval=1)
    return folder


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    source = open_weights(folder / f"iter_{step:07d}")
    return {name: source.read(name) for name in source.shapes()}


def require_equal(demo: Path, packed: Path, plain: Path) -> None:
    """The same losses and gradient norms, and weights that differ by little of what they have moved."""
    for ours, theirs in zip(metrics(packed), metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["consumed_samples"] == theirs["consumed_samples"]
    first, last = weights(plain, 1), weights(plain)
    moved = max(float((last[name] - first[name]).abs().max()) for name in first)
    assert moved > 1e-3
    ours = weights(packed)
    assert ours.keys() == last.keys()
    assert max(float((ours[name] - last[name]).abs().max()) for name in last) < 1e-4 * moved


def test_a_packed_run_is_the_run_without(
    demo: Path, mixed: dict[str, Any], plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(demo, tmp_path, **mixed, train_iters=STEPS, pack=BUDGET, num_workers=1)
    require_equal(demo, tmp_path, plain)


def run_all(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def test_every_layout_trains_the_samples_of_the_run_without(
    demo: Path, mixed: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["predictor"]["attention_async_offload"] = True
    (tmp_path / "offloading.json").write_text(json.dumps(content))
    commands = []
    for name, layout in LAYOUTS.items():
        flags = {**mixed, **layout, **({"mm_model": tmp_path / layout["mm_model"]} if "mm_model" in layout else {})}
        commands.append(words(demo, tmp_path / name, **flags, train_iters=STEPS, pack=BUDGET))
    run_ranks(2, run_all, commands, timeout_s=240)
    for name in LAYOUTS:
        require_equal(demo, tmp_path / name, plain)
