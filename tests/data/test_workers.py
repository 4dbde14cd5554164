"""Readers that hang, die and are interrupted, with real processes and real signals."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mm.data.workers import Outcome, Parcel, as_error, as_facts, bytes_to_share, read_in_order
from mm.errors import DataError, Problem

SHAPE = (3, 4, 5)


@dataclass(frozen=True)
class Reading:
    """Jobs are words: what to do, and a number that comes back as tensors and facts."""

    folder: Path

    def __call__(self, job: tuple[str, int], /) -> Parcel:
        what, number = job
        attempt = self.folder / f"{number}"
        tried_before = attempt.exists()
        attempt.write_text(str(os.getpid()))
        if what == "hang":
            time.sleep(3600)
        if what in signal.Signals.__members__ and not (number % 2 and tried_before):  # odd numbers die once only
            os.kill(os.getpid(), signal.Signals[what])
        if what == "leave":
            os._exit(3)
        if what == "bad":
            raise DataError("DATA-002", f"{number} is bad.", "Replace it.")
        tensors = {"a": torch.full(SHAPE, float(number)), "b": torch.full((7,), number, dtype=torch.bfloat16)}
        return Parcel(tensors, {"number": number, "process": os.getpid()})

    def describe(self, job: tuple[str, int], /) -> str:
        return f"clip {job[1]}"


def read(folder: Path, jobs: Any, num_workers: int = 2, time_limit: float = 60.0, again: Any = None) -> Any:
    return read_in_order(
        Reading(folder),
        jobs,
        num_workers=num_workers,
        time_limit=time_limit,
        buffer_bytes=bytes_to_share(SHAPE, (7,)),
        again=again,
    )


def numbers(outcomes: Any) -> list[Any]:
    return [o.facts["number"] if isinstance(o, Parcel) else o.id for _, o in outcomes]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_outcomes_come_in_order_with_their_tensors(num_workers: int, tmp_path: Path) -> None:
    jobs = [("bad" if number == 4 else "read", number) for number in range(9)]
    outcomes = list(read(tmp_path, jobs, num_workers))
    assert [job for job, _ in outcomes] == jobs
    assert numbers(outcomes) == [0, 1, 2, 3, "DATA-002", 5, 6, 7, 8]
    for (_, number), outcome in outcomes:
        if isinstance(outcome, Parcel):
            assert torch.equal(outcome.tensors["a"], torch.full(SHAPE, float(number)))
            assert torch.equal(outcome.tensors["b"], torch.full((7,), number, dtype=torch.bfloat16))
    processes = {outcome.facts["process"] for _, outcome in outcomes if isinstance(outcome, Parcel)}
    assert len(processes) == max(1, num_workers) and (os.getpid() in processes) == (num_workers == 0)


def test_readers_live_on_and_are_gone_at_the_end(tmp_path: Path) -> None:
    with closing(read(tmp_path, (("read", number) for number in count()), 2)) as outcomes:
        seen = [outcome.facts["process"] for _, outcome in islice(outcomes, 40)]
        assert len(set(seen)) == 2
        scores = {int(Path(f"/proc/{process}/oom_score_adj").read_text()) for process in seen}
        assert scores == {1000}, "the kernel takes a reader first"
    assert not any(psutil.pid_exists(process) for process in seen)


def test_a_reader_that_hangs_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    began = time.monotonic()
    outcomes = list(read(tmp_path, [("read", 0), ("hang", 1), ("read", 2), ("read", 3)], time_limit=1.0))
    assert numbers(outcomes) == [0, "DATA-070", 2, 3]
    assert "clip 1: its reader gave nothing in 1 s" in str(outcomes[1][1])
    assert time.monotonic() - began < 30
    assert not psutil.pid_exists(int((tmp_path / "1").read_text()))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGBUS"])
def test_a_reader_that_dies_is_replaced_once(name: str, tmp_path: Path) -> None:
    outcomes = list(read(tmp_path, [("read", 0), (name, 1), (name, 2), ("read", 4)]))
    assert numbers(outcomes) == [0, 1, "DATA-071", 4]
    assert f"clip 2: the process that read it died twice, of {name};" in str(outcomes[2][1])
    assert "GiB of memory is free" in str(outcomes[2][1])


def test_a_reader_that_leaves_is_told_with_its_exit_code(tmp_path: Path) -> None:
    assert "of exit code 3;" in str(next(read(tmp_path, [("leave", 2)]))[1])


def test_a_reader_killed_between_jobs_costs_nothing(tmp_path: Path) -> None:
    with closing(read(tmp_path, (("read", number) for number in range(6)), 1)) as outcomes:
        _, first = next(outcomes)
        os.kill(first.facts["process"], signal.SIGKILL)
        assert numbers(outcomes) == [1, 2, 3, 4, 5]


SENT_TO_ALL = """
import os, signal, sys
from contextlib import closing
from pathlib import Path
import psutil
from mm.data.fork_server import SENT_TO_ALL
from test_workers import numbers, read
if __name__ == "__main__":
    with closing(read(Path(sys.argv[1]), (("read", number) for number in range(8)), 1)) as outcomes:
        _, first = next(outcomes)
        reader = psutil.Process(first.facts["process"])
        server = reader.parent()
        assert server.pid != os.getpid()
        for name in SENT_TO_ALL:
            for process in (reader, server):
                process.send_signal(name)
        others = [outcome.facts["process"] for _, outcome in outcomes]
        assert others == [reader.pid] * 7, others
    assert numbers(read(Path(sys.argv[1]), [("read", 8)])) == [8]
    assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    print("done")
"""


def test_signals_that_are_sent_to_everybody_are_the_parents_affair(tmp_path: Path) -> None:
    """In a process of its own: pytest's has a server that tests' ranks are forked from, which hears signals."""
    assert_done(SENT_TO_ALL, tmp_path)


def assert_done(content: str, folder: Path) -> None:
    """A script with this content says so, in a process of its own."""
    script = folder / "script.py"
    script.write_text(content)
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here.parent}"}
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "done\n", done.stderr


SERVER_THAT_IS_GONE = """
import os, sys, time
from contextlib import closing
from pathlib import Path
import psutil
from test_workers import numbers, read
if __name__ == "__main__":
    with closing(read(Path(sys.argv[1]), (("read", number) for number in range(4)), 1)) as outcomes:
        _, first = next(outcomes)
        reader = psutil.Process(first.facts["process"])
        server = reader.parent()
        assert server.pid != os.getpid()
        server.kill()
        while server.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        others = [outcome.facts["process"] for _, outcome in outcomes]
        assert others == [reader.pid] * 3, others
    assert numbers(read(Path(sys.argv[1]), [("read", 4)])) == [4]
    print("done")
"""


def test_a_server_that_is_gone_is_started_again(tmp_path: Path) -> None:
    """In a process of its own: from pytest's server other tests' ranks are forked."""
    assert_done(SERVER_THAT_IS_GONE, tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_job_may_take_the_place_of_one(num_workers: int, tmp_path: Path) -> None:
    def again(job: tuple[str, int], outcome: Outcome) -> tuple[str, int] | None:
        return ("bad" if job[1] < 20 else "read", job[1] + 10) if isinstance(outcome, DataError) else None

    outcomes = read(tmp_path, [("read", 0), ("bad", 1), ("read", 2)], num_workers, again=again)
    assert numbers(outcomes) == [0, 31, 2]


def test_problems_cross_as_they_are() -> None:
    problems = [Problem("DATA-001", "a", "b"), Problem("DATA-002", "é\0", "d")]
    assert list(as_error(as_facts(problems)).problems) == problems


SCRIPT = """
import sys
from pathlib import Path
from test_workers import read
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for _ in read(folder, [("hang", 0), ("hang", 1), ("read", 2)]):
        pass
"""


@pytest.mark.parametrize(
    "name", ["SIGKILL", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("SIGINT", "SIGTERM"))]
)
def test_nothing_is_left_behind(name: str, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group; the other two to the parent alone, which cannot end its readers any more."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here.parent}"}
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, script, tmp_path], env=environment, start_new_session=True, stderr=errors
        )
    wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    assert len(family) >= 4, "the parent, the fork server, two readers"
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.Signals[name])
    assert process.wait(20) != 0
    wait_for(lambda: not any(psutil.pid_exists(member) for member in family))
    assert (tmp_path / "err").read_text().count("Traceback") == (name == "SIGINT"), "only the parent's own"


WITHOUT_A_GUARD = """
import sys
from pathlib import Path
from test_workers import numbers, read
print("begun", flush=True)
print(numbers(read(Path(sys.argv[1]), [("read", number) for number in range(3)], 2)))
"""


def test_a_script_without_a_guard_is_not_begun_anew_by_readers(tmp_path: Path) -> None:
    """As the examples of the Python API are written: multiprocessing would run them once more in each process."""
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_A_GUARD)
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[2]}:{here.parent}"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "begun\n[0, 1, 2]\n", done.stderr


LITTLE = """
import os
from pathlib import Path
from mm.cli.entry import run
from test_workers import numbers, read
def main(argv):
    print(numbers(read(Path(os.environ["HERE"]), [("read", 3), ("read", 4)], 1)))
print(run(main, []))
"""


@pytest.mark.parametrize(
    ("shared", "temporary", "said"),
    [
        pytest.param("size=4k", "size=64k", "[3, 4]\n0", marks=pytest.mark.nightly),  # one page in /dev/shm
        ("size=4k", "size=8k", "[3, 4]\n0"),  # and little more in TMPDIR, where a file with holes would fit
        ("size=1m", "nr_inodes=2", "74"),  # no room for the socket of the fork server
        pytest.param("size=1m", "nr_inodes=1", "74", marks=pytest.mark.nightly),  # nor for anything
    ],
)
def test_full_disks_for_temporary_files(shared: str, temporary: str, said: str) -> None:
    """In a private mount namespace, where no other folder can be written: outcomes or one line, within seconds."""
    mounts = f"mount -t tmpfs none /mnt && mount -t tmpfs -o {shared} none /dev/shm"
    for folder in ("/tmp", "/var/tmp", "/usr/tmp"):
        if Path(folder).is_dir():
            mounts += f" && mount -t tmpfs -o {temporary} none {folder}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mounts], capture_output=True).returncode:
        pytest.skip("this machine allows no private mounts")
    here = Path(__file__)
    variables = {"PYTHONPATH": f"{here.parents[2]}:{here.parent}", "HERE": "/mnt", "TMPDIR": "/tmp"}
    environment = {**os.environ, **variables}
    command = ["unshare", "-rm", "sh", "-c", f'{mounts} && cd /proc && exec "$0" -c "$1"', sys.executable, LITTLE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == said, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error ")]
    assert (len(lines) == 1 and lines[0].startswith("error RUN-02")) == (said == "74"), done.stderr


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "still not so after 30 s"
        time.sleep(0.05)
