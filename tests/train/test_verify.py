"""`--verify-checkpoint full`: a byte that has changed on disk is found before a run goes on from it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import WEIGHTS, bits, metrics, run, run_on

from mm.cli import train as train_command
from mm.errors import CheckpointError, ConfigError

SHARD = "shard-00000-of-00001.safetensors"
NEWEST = "iter_0000002"


@pytest.fixture(scope="module")
def saved(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two steps; of three, for comparison, in the folder beside."""
    folder = tmp_path_factory.mktemp("saved")
    run(demo, folder / "three", train_iters=3, save_interval=1)
    shutil.copytree(folder / "three", folder / "two")
    shutil.rmtree(folder / "two" / "iter_0000003")
    (folder / "two" / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A byte of the newest checkpoint's last weight is another."""
    folder = tmp_path / "run"
    shutil.copytree(saved / "two", folder)
    data = bytearray((folder / NEWEST / SHARD).read_bytes())
    data[-3] ^= 1
    (folder / NEWEST / SHARD).write_bytes(data)
    return folder


def test_full_falls_back_with_a_loud_line(
    demo: Path, saved: Path, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert bits(run(demo, damaged, train_iters=3, verify_checkpoint="full")) == bits(metrics(saved / "three"))
    [line] = [record.getMessage() for record in caplog.records if "Trying" in record.getMessage()]
    assert NEWEST in line and SHARD in line and line.endswith("Trying the one before it.")


def test_ranks_agree_about_it(demo: Path, saved: Path, damaged: Path) -> None:
    """Of one shard only one of two ranks sees the difference; both go on from step 1, whose repeated step shows it."""
    rows = run_on(2, demo, damaged, train_iters=3, verify_checkpoint="full", micro_batch_size=2, global_batch_size=4)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0] == metrics(saved / "three")[0]
    assert rows[1]["step_time_s"] != metrics(saved / "three")[1]["step_time_s"]


def test_strict_stops(demo: Path, damaged: Path) -> None:
    before = (damaged / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=f"CKPT-013.*{NEWEST}.*bytes of {SHARD} differ"):
        run(demo, damaged, train_iters=3, verify_checkpoint="full", resume_policy="strict")
    assert (damaged / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in damaged.glob("iter_*")) == ["iter_0000001", NEWEST]


def test_sizes_do_not_tell(demo: Path, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The default, which costs no reading, is blind for this: why there is a choice."""
    caplog.set_level("INFO")
    run(demo, damaged, train_iters=3)
    assert f"going on from {damaged / NEWEST}" in caplog.text


@pytest.mark.parametrize("more", [{}, {"finetune": True}], ids=["resume", "finetune"])
def test_what_load_names_is_checked_too(
    demo: Path, damaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any]
) -> None:
    caplog.set_level("INFO")
    run(demo, tmp_path / "out", load=damaged, train_iters=3, verify_checkpoint="full", **more)
    assert "Trying the one before it" in caplog.text
    assert str(damaged / "iter_0000001") in caplog.text


def test_a_checkpoint_that_is_named_itself(demo: Path, damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"CKPT-012.*bytes of {SHARD} differ"):
        run(demo, tmp_path / "out", load=damaged / NEWEST, train_iters=3, verify_checkpoint="full")


def test_it_needs_something_to_verify(demo: Path) -> None:
    with pytest.raises(ConfigError, match=r"CFG-024.*--verify-checkpoint full"):
        train_command.main(
            ["--mm-data", str(demo / "configs/feature_data.json"), "--mm-model",
             str(demo / "configs/pretrain_model.json"), "--init-from-scratch", "--train-iters", "1", "--lr", "1",
             "--verify-checkpoint", "full"]
        )  # fmt: skip


def test_adapters_are_checked_too(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = {"load_base_model": demo / WEIGHTS, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q"]}
    run(demo, tmp_path / "run", load=None, train_iters=2, save_interval=1, **flags)
    shard = tmp_path / "run" / NEWEST / SHARD
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    caplog.set_level("INFO")
    more = {"load": tmp_path / "run", "finetune": True, "verify_checkpoint": "full", "train_iters": 1}
    run(demo, tmp_path / "out", **flags, **more)
    assert f"loaded the adapters in {tmp_path / 'run' / 'iter_0000001'}" in caplog.text
