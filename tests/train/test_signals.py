"""A run that is asked to stop saves at the end of the step, says so, and goes on bit for bit when started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from programs import Forked, command
from ranks import ANY_PORT
from training_runs import bits, metrics, run, run_on, words

from mm.cli import train as train_command
from mm.stopping import AGAIN_S

ROOT = Path(__file__).parents[2]
STEPS = 400


def flags_of(demo: Path, save: Path, **flags: Any) -> list[str]:
    return words(demo, save, train_iters=STEPS, save_on_signal=True, **flags)


def start_one(demo: Path, save: Path, folder: Path, **flags: Any) -> Forked:
    return command(train_command.main, flags_of(demo, save, **flags), folder)


def start(demo: Path, save: Path, num_processes: int, **flags: Any) -> subprocess.Popen[str]:
    launcher = ["-m", "mm.cli.launch", "--nproc-per-node", str(num_processes), "--master-port", ANY_PORT]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "mm.cli.train", *flags_of(demo, save, **flags)],
        env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def wait_for_steps(save: Path, count: int, process: Forked | subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    path = save / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.nightly)])
def test_one_process_stops_and_goes_on(demo: Path, tmp_path: Path, name: str, in_background: bool) -> None:
    save = tmp_path / "run"
    flags = {"async_save": True, "save_interval": 2} if in_background else {}
    process = start_one(demo, save, tmp_path, **flags)
    wait_for_steps(save, 3, process)
    process.send_signal(getattr(signal, name))
    process.wait()
    told = process.said()
    assert process.returncode == 75, told
    (line,) = [line for line in told.splitlines() if line.startswith("error ")]
    assert line.startswith(f"error RUN-001: Stopped by {name} after step ")
    stopped_at = len(metrics(save))
    assert 3 <= stopped_at < STEPS
    assert sorted(path.name for path in save.glob("iter_*"))[-1] == f"iter_{stopped_at:07d}"
    resumed = run(demo, save, train_iters=stopped_at + 2)
    assert bits(resumed) == bits(run(demo, tmp_path / "straight", train_iters=stopped_at + 2))


def test_a_signal_to_one_rank_stops_all_after_the_same_step(demo: Path, tmp_path: Path) -> None:
    save, flags = tmp_path / "run", {"use_distributed_optimizer": True, "micro_batch_size": 2}
    process = start(demo, save, 2, **flags)
    wait_for_steps(save, 3, process)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 75
    assert told.count("error ") == 1
    assert told.splitlines()[-1].startswith("error RUN-001: Stopped by ")
    stopped_at = len(metrics(save))
    straight = run_on(2, demo, tmp_path / "straight", train_iters=stopped_at + 1, **flags)
    assert bits(run_on(2, demo, save, train_iters=stopped_at + 1, **flags)) == bits(straight)


def test_copies_of_a_signal_are_one(demo: Path, tmp_path: Path) -> None:
    """A scheduler sends it to every process of the job, and the launcher hands it on."""
    save = tmp_path / "run"
    process = start_one(demo, save, tmp_path)
    wait_for_steps(save, 2, process)
    for name in ("SIGTERM", "SIGTERM", "SIGUSR1", "SIGINT"):
        process.send_signal(getattr(signal, name))
        time.sleep(0.01)
    process.wait()
    told = process.said()
    assert process.returncode == 75, told
    assert told.count("error ") == 1
    assert len(list(save.glob("iter_*"))) == 1


@pytest.mark.nightly
def test_a_second_signal_ends_it_at_once(demo: Path, tmp_path: Path) -> None:
    """Also a process that never comes to the end of its step: here it waits for a peer that is stopped."""
    save = tmp_path / "run"
    process = start(demo, save, 2, micro_batch_size=2)
    wait_for_steps(save, 2, process)
    waits, stopped = children(process.pid)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(1)
    os.kill(waits, signal.SIGTERM)
    time.sleep(AGAIN_S + 0.5)
    os.kill(waits, signal.SIGTERM)
    started = time.monotonic()
    while waits in children(process.pid):
        assert time.monotonic() - started < 10
        time.sleep(0.05)
    os.kill(stopped, signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert told.splitlines()[-1].startswith("error RUN-011: Ended at once by a second signal (SIGTERM).")
    assert not list(save.glob("iter_*"))
