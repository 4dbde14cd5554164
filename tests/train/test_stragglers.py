"""A rank that keeps the others waiting is named with the phase in which it does."""

import linecache
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_hangs import Job, no_process_is_left  # noqa: F401  (a fixture)

from mm.parallel.stacks import where_is
from mm.train.stragglers import find, slow_devices


def test_who_is_slow_and_where() -> None:
    usual = [0.05, 0.50, 0.05, 0.10]
    assert find([usual] * 4) == []
    assert find([usual, [0.05, 0.58, 0.05, 0.10], usual, usual]) == []  # below 1.2 times
    (slow,) = find([usual, usual, [0.35, 0.40, 0.05, 0.10], usual])
    assert (slow.rank, slow.phase) == (2, "waiting for data")
    assert (slow.share, slow.usual) == (pytest.approx(0.9), pytest.approx(0.7))
    assert [slow.rank for slow in find([usual, [0.0, 0.9, 0, 0], [0.0, 0.95, 0, 0], usual, usual])] == [2, 1]


def test_which_device_is_slow() -> None:
    assert slow_devices([1.0, 1.1, 0.9, 1.19]) == []
    assert slow_devices([1.0, 1.3, 0.9, 2.0]) == [(3, 2.0, 1.0), (1, 1.3, 1.0)]


def test_looks_read_the_line_and_keep_no_file(tmp_path: Path) -> None:
    """Else the sources of torch would fill memory in the first hours, megabyte after megabyte."""
    file = tmp_path / "sleeper.py"
    file.write_text("import time\n\ndef sleep():\n    time.sleep(2)  # here: x.cpu()\n")
    thread = threading.Thread(target=runpy.run_path(str(file))["sleep"])
    thread.start()
    time.sleep(0.5)
    assert where_is(thread.ident or 0) == (True, "sleep")
    assert str(file) not in linecache.cache
    thread.join()


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_runs_half_of_the_time(demo: Path, tmp_path: Path, rank: int) -> None:
    job = Job(demo, tmp_path / "run", 2, straggler_interval=20, use_distributed_optimizer=True)
    job.wait_for_steps(5)
    slow, over = job.ranks()[rank], threading.Event()

    def brake() -> None:
        while not over.wait(0.02):
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.06)
            os.kill(slow, signal.SIGCONT)

    thread = threading.Thread(target=brake)
    thread.start()
    until = time.monotonic() + 60
    while "slow rank" not in job.text() and time.monotonic() < until:
        time.sleep(0.5)
    over.set()
    thread.join()
    job.process.terminate()
    job.wait()
    told = [line for _, line in job.lines if "slow rank" in line]
    assert told and all(f"slow rank {rank}:" in line for line in told), job.text()[-3000:]


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processor cores")
def test_a_slow_device_is_named(demo: Path, tmp_path: Path, rank: int) -> None:
    """Each rank has a processor core; two programs that only count share that of one rank."""
    job = Job(demo, tmp_path / "run", 2, straggler_interval=20, use_distributed_optimizer=True)
    job.wait_for_steps(5)
    cores = sorted(os.sched_getaffinity(0))[:2]
    for process, core in zip(job.ranks(), cores, strict=True):
        for thread in psutil.Process(process).threads():
            os.sched_setaffinity(thread.id, {core})
    counting = [subprocess.Popen(["taskset", "-c", str(cores[rank]), sys.executable, "-c", "while True: pass"])
                for _ in range(2)]  # fmt: skip
    until = time.monotonic() + 90
    while "slow device" not in job.text() and time.monotonic() < until:
        time.sleep(0.5)
    for process in counting:
        process.kill()
    job.process.terminate()
    job.wait()
    told = [line for _, line in job.lines if "slow device" in line]
    assert told and all(f"slow device of rank {rank}:" in line for line in told), job.text()[-3000:]
