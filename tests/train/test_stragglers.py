"""A rank that keeps the others waiting is named with the phase in which it does."""

import linecache
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from test_hangs import Job, no_process_is_left  # noqa: F401  (a fixture)

from mm.device.backend import select
from mm.supervise.stacks import where_is
from mm.train.callbacks.stragglers import STEP_PHASES, Looks, Stragglers, chance, find, slow_devices


def seen(*own: int, looks: int = 100) -> Looks:
    return Looks(own, looks)


def test_who_is_slow_and_where() -> None:
    usual = seen(5, 50, 5, 10)
    assert find([usual] * 4) == []
    assert find([usual, seen(5, 58, 5, 10), usual, usual]) == []  # below 1.2 times
    (slow,) = find([usual, usual, seen(35, 40, 5, 10), usual])
    assert (slow.rank, slow.phase) == (2, "waiting for data")
    assert (slow.share, slow.usual) == (pytest.approx(0.9), pytest.approx(0.7))
    assert [slow.rank for slow in find([usual, seen(0, 92, 0, 0), seen(0, 95, 0, 0), usual, usual])] == [2, 1]


def test_a_difference_that_chance_explains_or_that_costs_nothing_is_not_told() -> None:
    assert find([seen(0, 20, 0, 0), seen(0, 30, 0, 0)]) == []  # 1.5 times, in a hundred looks
    assert [slow.rank for slow in find([seen(0, 200, 0, 0, looks=1000), seen(0, 300, 0, 0, looks=1000)])] == [1]
    assert find([seen(0, 1000, 0, 0, looks=100_000), seen(0, 4000, 0, 0, looks=100_000)]) == []  # 3 % of a step


@pytest.mark.parametrize(("own", "usual", "looks"), [(9, 2, 10), (30, 12, 100), (55, 55, 120), (0, 4, 40), (7, 7, 7)])
def test_the_chance_is_that_of_drawing_without_putting_back(own: int, usual: int, looks: int) -> None:
    """Counted: of all ways to spread the looks at work over both ranks, those that give the first one so many."""
    working = own + usual
    ways = [math.comb(looks, first) * math.comb(looks, working - first) for first in range(min(working, looks) + 1)
            if working - first <= looks]  # fmt: skip
    beyond = [
        math.comb(looks, first) * math.comb(looks, working - first) for first in range(own, min(working, looks) + 1)
    ]
    assert chance(seen(own, looks=looks), seen(usual, looks=looks)) == pytest.approx(sum(beyond) / sum(ways))


def simulated(draw: np.random.Generator, shares: Sequence[float], looks: int) -> list[Looks]:
    """Looks at ranks that work on their own for a share of each step, a fifth of it in the optimizer."""
    return [Looks([0, own - own // 5, 0, own // 5], looks) for own in draw.binomial(looks, shares).tolist()]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 32, 64])
def test_equal_ranks_are_hardly_ever_named(ranks: int) -> None:
    """At most in one comparison of a hundred, whatever the share of own work, with as many looks as there are."""
    draw = np.random.default_rng(ranks)
    cases = [(share, looks) for share in (0.02, 0.1, 0.3, 0.6, 0.9) for looks in (100, 120, 400)]
    named = Counter((share, looks) for share, looks in cases for _ in range(200)
                    if find(simulated(draw, [share] * ranks, looks)))  # fmt: skip
    assert named.total() <= 0.01 * 200 * len(cases), named
    assert max(named.values(), default=0) <= 6, named  # 200 comparisons: 2 expected at the most, 6 in 1 of 200 runs


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 32, 64])
def test_a_rank_of_half_the_speed_is_named(ranks: int) -> None:
    draw = np.random.default_rng(ranks)
    for usual, least in ((0.25, 60), (0.45, 99)):  # of 100 comparisons with as few looks as there can be
        slow_ones = [find(simulated(draw, [usual] * (ranks - 1) + [2 * usual], 100)) for _ in range(100)]
        named = [{slow.rank for slow in found} for found in slow_ones]
        assert sum(ranks - 1 in found for found in named) >= least, usual
        assert sum(bool(found - {ranks - 1}) for found in named) <= 3, usual


class Probes:
    """Comparisons of devices whose products take what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
        self.seconds = [1.0] * ranks
        looks = {(phase, own): 50 for phase in STEP_PHASES for own in (True, False)}
        watch = SimpleNamespace(take_samples=lambda: Counter(looks))
        mesh = SimpleNamespace(gather=self._of_all, tp_rank=0, cp_rank=0, dp_rank=0, pp_rank=0)
        monkeypatch.setattr("mm.train.callbacks.stragglers.product_seconds", lambda backend: 0.0)
        self.compare = Stragglers(watch, mesh, select("cpu")).compare  # type: ignore[arg-type]

    def _of_all(self, values: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.seconds)[:, None] if len(values) == 1 else values.expand(len(self.seconds), -1)


def test_a_device_is_named_when_two_comparisons_agree(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probes = Probes(monkeypatch, ranks=4)
    for step, seconds in enumerate([[1, 1.3, 1, 1], [1, 1, 1.3, 1], [1, 1.09, 1, 1.08], [1, 2, 1, 1], [1, 2, 1, 1.3]]):
        probes.seconds = seconds
        probes.compare(step)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told[0].startswith("step 4 | slow device of rank 1:"), told


def test_equal_devices_are_hardly_ever_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """64 devices, each figure 2 % up or down, and one of a hundred disturbed: at most one comparison of a hundred."""
    draw, probes, comparisons = np.random.default_rng(0), Probes(monkeypatch, ranks=64), 1000
    for step in range(comparisons):
        probes.seconds = (draw.normal(1.0, 0.02, 64) * np.where(draw.random(64) < 0.01, 1.5, 1.0)).tolist()
        probes.compare(step)
    assert len({record.getMessage().partition(" |")[0] for record in caplog.records}) <= 0.01 * comparisons


def test_which_device_is_slow() -> None:
    assert slow_devices([1.0, 1.05, 0.95, 1.09]) == []
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
