"""A disk that refuses what a run writes: the run goes on where it may, and nothing on disk is torn."""

import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, run

from mm.checkpoint import fault
from mm.errors import CheckpointError
from mm.train.records import read_metrics

FOUR = {"train_iters": 4, "save_interval": 1}


@pytest.fixture(scope="module")
def straight(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(demo, tmp_path_factory.mktemp("straight") / "run", train_iters=4)


def inject(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("MM_FAULT", setting)
    monkeypatch.setattr(fault, "_passed", Counter())


def folders(save: Path) -> list[str]:
    return sorted(path.name for path in save.iterdir() if "iter" in path.name and path.is_dir())


@pytest.mark.parametrize("async_save", [False, True])
def test_a_refused_save_is_told_and_the_next_one_is_there(
    demo: Path, tmp_path: Path, straight: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, async_save: bool,
) -> None:  # fmt: skip
    inject(monkeypatch, "save.shard_half_written:2:enospc")
    with caplog.at_level(logging.ERROR):
        found = run(demo, tmp_path / "run", on_save_failure="warn", async_save=async_save, **FOUR)
    assert bits(found) == bits(straight)
    assert folders(tmp_path / "run") == ["iter_0000001", "iter_0000003", "iter_0000004"]
    (told,) = [record.getMessage() for record in caplog.records if "is not saved" in record.getMessage()]
    assert told.startswith(f"{'the save in the background' if async_save else 'step 2'} is not saved, the run goes on")
    assert "CKPT-031" in told


def test_without_the_policy_the_run_ends(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, "save.shard_half_written:2:enospc")
    with pytest.raises(CheckpointError) as caught:
        run(demo, tmp_path / "run", **FOUR)
    assert caught.value.id == "CKPT-031"
    assert folders(tmp_path / "run") == ["iter_0000001"]


@pytest.mark.parametrize("async_save", [False, True])
def test_the_last_save_must_succeed(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    inject(monkeypatch, "save.shard_half_written:4:enospc")
    with pytest.raises(CheckpointError) as caught:
        run(demo, tmp_path / "run", on_save_failure="warn", async_save=async_save, **FOUR)
    assert caught.value.id == "CKPT-031"
    assert folders(tmp_path / "run") == ["iter_0000001", "iter_0000002", "iter_0000003"]


def test_what_is_no_disk_is_not_passed_over(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, "save.shard_half_written:2:raise")
    with pytest.raises(fault.FaultInjected):
        run(demo, tmp_path / "run", on_save_failure="warn", **FOUR)


METRICS = """
import logging, resource, sys
from pathlib import Path
from mm.train.records import StepMetrics
from mm.train.sinks.base import opened
from mm.train.sinks.console import Console
from mm.train.sinks.json_lines import JsonLines
from mm.train.sinks.tensorboard import TensorBoard

folder, hard = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)

def line(step):
    return StepMetrics(step, 0.5, "0x1p-1", 1.0, "0x1p0", 1e-3, step, 1.0, 1.0, 1.0, 1.0)

def largest_file(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

sinks = [JsonLines(folder), TensorBoard(folder / "board"), Console(100, progress_bar=False)]
with opened(sinks, first_step=1, total_steps=8) as write:
    for step in range(1, 9):
        if step == 3:  # half a line more
            largest_file((folder / "metrics.jsonl").stat().st_size + 100)
        if step == 6:
            largest_file(hard)
        write([line(step)])
"""


def test_metrics_are_lost_in_whole_lines_and_do_not_end_the_run(tmp_path: Path) -> None:
    """A real refusal by the kernel: for three steps no file may grow."""
    done = subprocess.run(
        [sys.executable, "-c", METRICS, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert [row.step for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 6, 7, 8]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 5
    told = [line for line in done.stdout.splitlines() if "metrics.jsonl" in line]
    assert len(told) == 2, done.stdout
    assert "cannot be written (" in told[0]
    assert told[1].endswith("is written again; 3 lines are lost")
