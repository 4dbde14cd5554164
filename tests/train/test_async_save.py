"""`--async-save`: the same checkpoints as without, written while the next steps run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, run, run_on, words

from mm.checkpoint import background, fault
from mm.checkpoint.store import find_latest, save
from mm.cli.entry import run as run_command
from mm.cli.train import main

ROOT = Path(__file__).parents[2]
FLAGS: dict[str, Any] = {"train_iters": 4, "save_interval": 2}


def shards(save_path: Path) -> dict[str, bytes]:
    return {str(path.relative_to(save_path)): path.read_bytes() for path in save_path.glob("iter_*/*.safetensors")}


def test_checkpoints_are_those_of_the_loop(demo: Path, tmp_path: Path) -> None:
    expected = run(demo, tmp_path / "loop", **FLAGS)
    found = run(demo, tmp_path / "background", **FLAGS, async_save=True)
    assert bits(found) == bits(expected)
    assert len(shards(tmp_path / "loop")) == 2
    assert shards(tmp_path / "background") == shards(tmp_path / "loop")


@pytest.mark.nightly
def test_two_ranks_save_and_go_on(demo: Path, tmp_path: Path) -> None:
    flags = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "micro_batch_size": 2}
    straight = run_on(2, demo, tmp_path / "straight", **{**FLAGS, "train_iters": 6}, **flags)
    run_on(2, demo, tmp_path / "stopped", **FLAGS, **flags, async_save=True)
    resumed = run_on(2, demo, tmp_path / "stopped", **{**FLAGS, "train_iters": 6}, **flags, async_save=True)
    assert bits(resumed) == bits(straight)
    assert shards(tmp_path / "stopped") == shards(tmp_path / "straight")


def test_steps_run_while_a_checkpoint_is_written(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The writing of step 2 is held up until step 3 has been taken."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    seen = []

    def held_up(root: Path, step: int, *rest: Any, **others: Any) -> Path:
        deadline = time.monotonic() + 30
        while step == 2 and len(metrics.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline, "step 3 waits for the checkpoint of step 2"
            time.sleep(0.01)
        seen.append((step, len(metrics.read_text().splitlines())))
        return save(root, step, *rest, **others)

    monkeypatch.setattr(background, "save", held_up)
    with caplog.at_level("INFO"):
        run(demo, tmp_path / "run", **FLAGS, async_save=True)
    assert seen[0][0] == 2 and seen[0][1] >= 3
    assert [int(path.name[5:]) for path in sorted((tmp_path / "run").glob("iter_*"))] == [2, 4]
    told = [record.getMessage() for record in caplog.records if "the loop stood still for" in record.getMessage()]
    assert len(told) == 2


def test_a_full_disk_in_the_background_stops_the_run(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(demo, tmp_path / "run", train_iters=1)
    monkeypatch.setenv("MM_FAULT", "save.shard_written:1:enospc")
    monkeypatch.setattr(fault, "_passed", Counter())
    code = run_command(main, words(demo, tmp_path / "run", train_iters=9, save_interval=3, async_save=True))
    assert code == 74
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]
    assert line.startswith("error CKPT-031")
    assert find_latest(tmp_path / "run").name == "iter_0000001"
    monkeypatch.delenv("MM_FAULT")
    assert len(run(demo, tmp_path / "run", train_iters=3, async_save=True)) == 3


def test_it_needs_a_folder(demo: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, words(demo, None, train_iters=1, async_save=True)) == 64
    assert "error CFG-024: --async-save has no effect without --save" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("processes", "stops"),
    [(1, False), pytest.param(2, False, marks=pytest.mark.nightly), pytest.param(1, True, marks=pytest.mark.nightly)],
)
@pytest.mark.nightly
def test_a_last_save_that_is_slower_than_every_limit_is_waited_for(
    processes: int, stops: bool, demo: Path, tmp_path: Path
) -> None:
    """The watch ends a run after 2 s without progress; the disk needs several times that."""
    save, limit = tmp_path / "run", 2
    told = save / "metrics.jsonl"
    flags = {"train_iters": 100_000 if stops else 2, "async_save": True, "hang_timeout": limit, "micro_batch_size": 2}
    program = [str(Path(__file__).with_name("slow_disk.py")), "1.5", *words(demo, save, **flags, save_on_signal=stops)]
    launcher = ["-m", "mm.cli.launch", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *program]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as job:
        try:
            until = time.monotonic() + 90
            while stops and len(told.read_text().splitlines() if told.exists() else "") < 2:
                assert job.poll() is None and time.monotonic() < until
                time.sleep(0.1)
            if stops:
                job.send_signal(signal.SIGTERM)
            _, said = job.communicate(timeout=120)
        finally:
            job.kill()
    assert job.returncode == (75 if stops else 0), said
    assert "RUN-003" not in said
    found = re.search(r"committed; the loop stood still for [\d.]+ s of ([\d.]+) s", said)
    assert found and float(found[1]) > 2 * limit, said
    assert find_latest(save) is not None
