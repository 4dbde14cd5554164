"""A job of which one process stops, dies or fails: who is named, what is printed, who leaves and when."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from ranks import ANY_PORT
from store_content import as_files
from training_runs import bits, metrics, run_on, words

ROOT = Path(__file__).parents[2]
LIMIT = 5


class Job:
    """`mm train` on several processes, as a user starts it; the lines of its standard error with their times.

    Attributes:
        started: all of them, for `no_process_is_left`.
    """

    started: ClassVar[list["Job"]] = []

    def __init__(
        self, demo: Path, save: Path, num_processes: int, launcher: tuple[str, ...] = (), **flags: Any
    ) -> None:
        self.save = save
        command = [
            sys.executable, "-m", "mm.cli.launch", "--nproc-per-node", str(num_processes),
            "--master-port", ANY_PORT, *launcher, "-m", "mm.cli.train",
            *words(demo, save, **{"train_iters": 100_000, "micro_batch_size": 2, **flags}),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.started.append(self)

    def _read(self) -> None:
        for line in self.process.stderr or []:
            self.lines.append((time.monotonic(), line.rstrip()))

    def wait_for_steps(self, count: int) -> None:
        path, until = self.save / "metrics.jsonl", time.monotonic() + 240  # a machine that does much else
        while not path.exists() or len(path.read_text().splitlines()) < count:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < until, self.text()
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """Process ids by rank."""
        found = {}
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            variables = Path(f"/proc/{child}/environ").read_text().split("\0")
            found |= {int(v.partition("=")[2]): int(child) for v in variables if v.startswith("RANK=")}
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout: float = 240) -> int:
        code = self.process.wait(timeout)
        self._reader.join(10)
        return code

    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A test that fails must not leave a job that trains for ever."""
    yield
    while Job.started:
        process = Job.started.pop().process
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
def test_a_stopped_process_is_named(demo: Path, tmp_path: Path, rank: int) -> None:
    job = Job(demo, tmp_path / "run", 3, hang_timeout=LIMIT, use_distributed_optimizer=True)
    job.wait_for_steps(5)
    os.kill(job.ranks()[rank], signal.SIGSTOP)
    stopped = time.monotonic()
    assert job.wait() == 124, job.text()
    (table_at,) = [at for at, line in job.lines if re.match(r" *rank +host +step", line)]
    assert table_at - stopped < LIMIT + 10
    rows = [line for _, line in job.lines if re.match(r" *\d+  ", line)]
    assert rows[0].split()[0] == str(rank)
    assert "does not answer" in rows[0]
    assert len(rows) == 3
    last = job.lines[-1][1]
    assert last.startswith(f"error RUN-003: No progress for {LIMIT} s in step ")
    assert f"Suspect: rank {rank} on " in last
    assert job.text().count("error RUN-003") == 1
    stacks = sorted(path.name for path in (tmp_path / "run" / "hang").iterdir())
    assert stacks == [f"rank-{other}.txt" for other in range(3) if other != rank]


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_file_of_a_stopped_reader_is_named(demo: Path, tmp_path: Path, num_processes: int) -> None:
    """After `--read-timeout`, with the watch's own limits, of which that of a step (120 s) is shorter."""
    job = Job(demo, tmp_path / "run", num_processes, num_workers=1, read_timeout=150)
    job.wait_for_steps(5)
    (server,) = (child for child in psutil.Process(job.ranks()[-1]).children() if "forkserver" in str(child.cmdline()))
    (reader,) = server.children()
    reader.suspend()
    assert job.wait(300) == 65, job.text()
    last = job.lines[-1][1]
    assert last.startswith("error DATA-070: ")
    assert "/body.bin (videos/" in last
    assert "its reader gave nothing in 150 s" in last
    assert job.text().count("error ") == 1
    assert not psutil.pid_exists(reader.pid)


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_job_that_is_suspended_goes_on(demo: Path, tmp_path: Path, num_processes: int) -> None:
    """As `scontrol suspend` and `docker pause` do it: all processes, for longer than the limit."""
    limit = 20
    job = Job(demo, tmp_path / "run", num_processes, hang_timeout=limit, num_workers=1)
    job.wait_for_steps(5)
    launcher = psutil.Process(job.process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for process in family:
        process.suspend()
    time.sleep(limit + 5)
    before = len(metrics(tmp_path / "run"))
    for process in family:
        process.resume()
    job.wait_for_steps(before + 10)
    job.process.send_signal(signal.SIGTERM)
    assert job.wait() == 143, job.text()
    assert "RUN-003" not in job.text()


@pytest.mark.nightly
@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_process_ends_the_others_and_a_restart_goes_on(demo: Path, tmp_path: Path, attempt: int) -> None:
    """With torchrun's elastic restarts the same start goes on by itself, looked at all the time."""
    flags = {"save_interval": 1, "train_iters": 30, "global_batch_size": 4, "straggler_interval": 5}
    job = Job(demo, tmp_path / "run", 2, ("--max-restarts", "1"), **flags)
    job.wait_for_steps(5)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait(150) == 0, job.text()
    assert "going on from" in job.text()
    straight = run_on(2, demo, tmp_path / "straight", micro_batch_size=2, **flags)
    assert bits(metrics(tmp_path / "run")) == bits(straight)


def test_a_killed_process_without_restarts(demo: Path, tmp_path: Path) -> None:
    job = Job(demo, tmp_path / "run", 2)
    job.wait_for_steps(3)
    os.kill(job.ranks()[0], signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait() == 74, job.text()
    assert time.monotonic() - killed < 30
    assert job.lines[-1][1].startswith("error RUN-004: ")
    assert job.text().count("error ") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("restarts", [0, 3])
def test_the_first_failure_is_the_last_line_once(demo: Path, tmp_path: Path, restarts: int) -> None:
    """A feature that one of two replicas cannot read; another start, which torchrun would make, cannot mend that."""
    home = tmp_path / "demo"
    shutil.copytree(demo, home, symlinks=True)
    for path in (home / "configs").rglob("*.*"):
        path.write_text(path.read_text().replace(str(demo), str(home)))
    file = sorted(as_files(home / "features").rglob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-7])
    job = Job(home, tmp_path / "run", 2, ("--max-restarts", str(restarts)), micro_batch_size=1)
    assert job.wait(120) == 65, job.text()
    errors = [line for _, line in job.lines if "error " in line]
    assert len(errors) == 1, job.text()
    assert job.lines[-1][1] == errors[0]
    if restarts:
        assert errors[0].startswith("error RUN-002: ")
    assert "error DATA-011: " in errors[0]
    assert file.name in errors[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) < 16
