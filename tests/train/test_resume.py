"""A stopped run goes on as if nothing had happened, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, run, run_on

from mm.errors import CheckpointError, ConfigError

SCHEDULE = {"lr_decay_style": "cosine", "lr_warmup_iters": 3, "lr_decay_iters": 10}
ROWS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32-distributed-optimizer": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "bf16": {"bf16": True},
    "bf16-distributed-optimizer": {"bf16": True, "use_distributed_optimizer": True},
    "accumulation": {"micro_batch_size": 2, "global_batch_size": 6, "use_distributed_optimizer": True},
}


@pytest.fixture
def model_json(demo: Path, tmp_path: Path) -> Path:
    """pretrain_model.json without a precision of its own, so that --bf16 alone decides."""
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    del content["predictor"]["dtype"]
    path = tmp_path / "pretrain_model.json"
    path.write_text(json.dumps(content))
    return path


EVERY_DAY = ("fp32", "bf16-distributed-optimizer", "accumulation")


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[] if row in EVERY_DAY else [pytest.mark.nightly]) for row in ROWS]
)
def test_ten_steps_are_five_and_five(demo: Path, tmp_path: Path, model_json: Path, row: str) -> None:
    flags = {**SCHEDULE, **ROWS[row], "mm_model": model_json}
    straight = run(demo, tmp_path / "straight", train_iters=10, **flags)
    run(demo, tmp_path / "stopped", train_iters=5, **flags)
    resumed = run(demo, tmp_path / "stopped", train_iters=10, **flags)
    assert bits(resumed) == bits(straight)
    assert len({row["loss_hex"] for row in straight}) == 10
    shard = "iter_0000010/shard-00000-of-00001.safetensors"
    assert (tmp_path / "straight" / shard).read_bytes() == (tmp_path / "stopped" / shard).read_bytes()


def test_a_kill_between_two_checkpoints_repeats_the_steps_after_the_last(demo: Path, tmp_path: Path) -> None:
    straight = run(demo, tmp_path, train_iters=7, save_interval=3)
    shutil.rmtree(tmp_path / "iter_0000007")  # as if killed before the last checkpoint
    again = run(demo, tmp_path, train_iters=7, save_interval=3)
    assert bits(again) == bits(straight)


def test_a_finished_run_has_nothing_to_do(demo: Path, tmp_path: Path) -> None:
    straight = run(demo, tmp_path, train_iters=2)
    assert bits(run(demo, tmp_path, train_iters=2)) == bits(straight)


def test_two_replicas_go_on_where_one_stopped(demo: Path, tmp_path: Path) -> None:
    """Another data-parallel size and micro-batch: the global batches, noise and timesteps stay the same."""
    flags = {**SCHEDULE, "global_batch_size": 4, "use_distributed_optimizer": True}
    straight = run(demo, tmp_path / "straight", train_iters=6, **flags)
    run(demo, tmp_path / "moved", train_iters=3, **flags)
    moved = run_on(2, demo, tmp_path / "moved", train_iters=6, micro_batch_size=1, **flags)
    for one, two in zip(straight, moved, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert (two["lr"], two["consumed_samples"]) == (one["lr"], one["consumed_samples"])


def test_another_seed_is_refused_unless_meant(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=1)
    with pytest.raises(CheckpointError, match="CKPT-071"):
        run(demo, tmp_path, train_iters=2, seed=1)
    assert len(run(demo, tmp_path, train_iters=2, seed=1, no_load_rng=True)) == 2


def test_a_checkpoint_without_optimizer_is_refused_unless_meant(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=1, no_save_optim=True)
    with pytest.raises(CheckpointError, match="CKPT-072"):
        run(demo, tmp_path, train_iters=2)
    assert len(run(demo, tmp_path, train_iters=2, no_load_optim=True)) == 2


def test_another_model_is_refused(demo: Path, tmp_path: Path, model_json: Path) -> None:
    run(demo, tmp_path / "run", train_iters=1)
    content = json.loads(model_json.read_text())
    content["predictor"] |= {"num_heads": 8, "num_layers": 3}
    model_json.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        run(demo, tmp_path / "run", train_iters=2, mm_model=model_json)
    assert [problem.id for problem in caught.value.problems] == ["CFG-028", "CFG-028"]


def test_finetune_takes_the_weights_alone(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "first", train_iters=2)
    rows = run(demo, tmp_path / "second", train_iters=1, load=tmp_path / "first", finetune=True)
    assert [row["step"] for row in rows] == [1]
    resumed = run(demo, tmp_path / "third", train_iters=3, load=tmp_path / "first")
    assert [row["step"] for row in resumed] == [3]
