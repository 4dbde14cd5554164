"""Who keeps a job from going on, told by the processes' own stacks: a rank that is late, and one that is alone."""

import contextlib
import io
import math
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from programs import command
from ranks import ANY_PORT, run_ranks

from mm.cli import launch
from mm.config.place import process_place
from mm.errors import ConfigError, DataError, EndedElsewhereError, LostProcessError
from mm.supervise import watchdog as watch_module
from mm.supervise.job import Job
from mm.supervise.limits import Limits
from mm.supervise.mailbox import Mailbox
from mm.supervise.watchdog import Doing, Watchdog, by_suspicion, hang, table

LIMIT = 2.0


class SlowMailbox(Mailbox):
    """A mailbox whose store answers late."""

    asked = False

    def failure(self) -> Any:
        self.asked = True
        time.sleep(1)
        return super().failure()


@pytest.mark.parametrize("error", [None, ValueError])
def test_no_thread_of_the_watch_outlives_it(error: type[Exception] | None) -> None:
    """One that waits for the store when the interpreter ends would end the process by SIGABRT."""
    ended = contextlib.nullcontext() if error is None else pytest.raises(error)
    mailbox = SlowMailbox(None, 0, 1)
    with ended, Watchdog(mailbox, Limits(None, 60), None):
        while not mailbox.asked:
            time.sleep(0.01)
        if error is not None:
            raise error
    assert [thread.name for thread in threading.enumerate() if thread.name == "watch"] == []


def hang_with_a_late_rank(late: int, folder: str) -> dict[str, Any]:
    """One rank sleeps where it should read data; the others wait for it in a collective of the next phase."""
    where, left = process_place(), []
    sys.stderr = (Path(folder) / f"stderr-{where.rank}").open("w")
    with Job(where, "gloo", torch.device("cpu"), 1) as job:
        notices = Mailbox(job.messages(5), where.rank, where.world_size)
        watch = Watchdog(notices, Limits(LIMIT, 60), Path(folder), leave=lambda code: left.append(code))
        began = time.monotonic()
        with watch:
            watch.begin_step(7)
            with watch.during("waiting for data"):
                if where.rank == late:
                    while not left:
                        time.sleep(0.1)
            with watch.during("forward and backward"):
                dist.all_reduce(torch.zeros(1))
        while not left and time.monotonic() < began + 30:
            time.sleep(0.05)
        failure = notices.failure()
    return {"left": left[:1], "text": failure.text if failure else None, "seconds": time.monotonic() - began}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Future[list[Any]]]]]:
    """Jobs that wait for their limits, which is all that they do: at once. By name their folders and results."""
    with ThreadPoolExecutor() as pool:
        started = {}
        for name, world_size, function, args in (
            ("late 0", 3, hang_with_a_late_rank, [0]),
            ("late 2", 3, hang_with_a_late_rank, [2]),
            ("stopped", 2, wait_without_a_limit, []),
        ):
            folder = tmp_path_factory.mktemp("job")
            more = [*args, str(folder)] if args else []
            started[name] = folder, pool.submit(run_ranks, world_size, function, *more)
        yield started


@pytest.mark.parametrize("late", [0, 2])
def test_a_late_rank_is_named(late: int, jobs: dict[str, tuple[Path, Future[list[Any]]]]) -> None:
    folder, job = jobs[f"late {late}"]
    told = job.result()
    assert [found["left"] for found in told] == [[124]] * 3
    assert all(found["seconds"] < LIMIT + 10 for found in told)
    for found in told:
        assert found["text"].startswith(
            f"error RUN-003: No progress for {LIMIT:.0f} s in step 7. Suspect: rank {late} on "
        )
        assert "behind the others in the phase: waiting for data" in found["text"]
    texts = [(folder / f"stderr-{rank}").read_text() for rank in range(3)]
    (printed,) = [text for text in texts if text]
    assert printed.count("error RUN-003") == 1
    rows = [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]
    assert int(rows[0][0]) == late
    assert all("all_reduce" in row for row in map(" ".join, rows[1:]))
    for rank in range(3):
        text = (folder / f"rank-{rank}.txt").read_text()
        assert ("all_reduce" in text) == (rank != late)


def wait_for_a_reader(ends: str, folder: str) -> dict[str, Any]:
    """Rank 1 waits for data, by a limit of its own that is longer than the watch's; rank 0 waits for it."""
    where, left = process_place(), []
    sys.stderr = (Path(folder) / f"stderr-{where.rank}").open("w")
    began = time.monotonic()
    with Job(where, "gloo", torch.device("cpu"), 1) as job:
        notices = Mailbox(job.messages(5), where.rank, where.world_size)
        limits = Limits(LIMIT, 60, {"waiting for data": 4 * LIMIT})
        watch = Watchdog(notices, limits, Path(folder), leave=lambda code: left.append(code))
        try:
            with watch:
                if where.rank == 1:
                    with watch.during("waiting for data"):
                        time.sleep(2 * LIMIT)
                        if ends == "an error":
                            raise DataError("DATA-070", "clip 3: its reader gave nothing.", "Replace it.")
                        if ends == "a hang":
                            while not left:
                                time.sleep(0.1)
                with watch.during("forward and backward"):
                    dist.all_reduce(torch.zeros(1))
        except (DataError, EndedElsewhereError):
            pass
        failure = notices.failure()
    return {"left": left[:1], "text": failure.text if failure else None, "seconds": time.monotonic() - began}


@pytest.mark.parametrize(("ends", "code"), [("data", None), ("an error", 65), ("a hang", 124)])
@pytest.mark.nightly
def test_who_waits_by_a_limit_of_its_own_has_the_word(ends: str, code: int | None, tmp_path: Path) -> None:
    told = run_ranks(2, wait_for_a_reader, ends, str(tmp_path))
    if code is None:
        assert [(found["left"], found["text"]) for found in told] == [([], None)] * 2
    elif code == 65:
        assert [found["text"] for found in told] == [
            "error DATA-070: clip 3: its reader gave nothing. Fix: Replace it."
        ] * 2
    else:
        assert [found["left"] for found in told] == [[124]] * 2
        assert all("Suspect: rank 1 on " in found["text"] for found in told)


def test_a_neighbour_that_is_stopped_is_missed_in_a_phase_without_a_limit(
    jobs: dict[str, tuple[Path, Future[list[Any]]]],
) -> None:
    assert jobs["stopped"][1].result() == [[124], []]


def wait_without_a_limit() -> list[int]:
    """Rank 0 is in a phase without a limit; rank 1 has no watch, as a process that is stopped."""
    where, left = process_place(), []
    watch_module.SILENT_S, watch_module.TOLD_S = 3.0, 1.0
    sys.stderr = io.StringIO()
    with Job(where, "gloo", torch.device("cpu"), 1) as job:
        notices = Mailbox(job.messages(5), where.rank, where.world_size)
        if where.rank == 0:
            limits = Limits(LIMIT, 60, {"saving": math.inf})
            with Watchdog(notices, limits, None, leave=left.append) as watch, watch.during("saving"):
                until = time.monotonic() + 30
                while not left and time.monotonic() < until:
                    time.sleep(0.05)
        dist.barrier()
    return left[:1]


def wait_for_a_handle() -> bool:
    """Whether a rank is seen waiting: rank 0 waits for a message whose handle it holds, rank 1 sleeps."""
    where = process_place()
    with Job(where, "gloo", torch.device("cpu"), 1) as job:
        watch = Watchdog(Mailbox(job.messages(5), where.rank, 2), Limits(60, 60), None)
        with watch, watch.during("forward and backward"):
            if where.rank == 0:
                handle = dist.irecv(torch.zeros(1), 1)
                handle.wait()
            else:
                time.sleep(2)
                dist.send(torch.zeros(1), 0)
        return watch.samples["forward and backward", True] > watch.samples["forward and backward", False]


def test_waiting_is_told_from_working() -> None:
    assert run_ranks(2, wait_for_a_handle) == [True, False]


def test_one_process_alone_ends_too(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(Mailbox(None, 0, 1), Limits(0.5, 60), tmp_path, leave=left.append) as watch, watch.during("saving"):
        until = time.monotonic() + 20
        while not left and time.monotonic() < until:
            time.sleep(0.05)
    assert left[0] == 124
    printed = capfd.readouterr().err
    assert printed.splitlines()[-1].startswith("error RUN-003: No progress for 0 s in step 0. ")
    assert "test_one_process_alone_ends_too" in (tmp_path / "rank-0.txt").read_text()


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, "
OF_OTHERS = {
    "gloo": "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:41923",
    "NCCL, the other is gone": NCCL + "remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "NCCL, its socket": NCCL + "unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node1<40123>",
    "torch's watchdog": "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=880, OpType=BROADCAST, "
    "NumelIn=131137536, NumelOut=131137536, Timeout(ms)=1800000) ran for 1800778 milliseconds before timing out.",
    "torch, after the watchdog": "NCCL communicator was aborted on rank 3.",
    "HCCL": "EI0002: [PID: 7277] 2024-11-28-11:59:30.645.648 The wait execution of the Notify register times out.",
}
OWN = {
    "CUDA": NCCL + "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5",
    "usage": NCCL + "invalid usage, NCCL version 2.27.5\nncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0",
    "a defect": "mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)",
}


@pytest.mark.parametrize("words", OF_OTHERS)
def test_the_words_of_every_backend_for_a_lost_process(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "LEAVE_S", 0.2)
    lost = pytest.raises(LostProcessError, match="RUN-004: Rank 0 lost another process of the job in the phase: saving")
    with lost, Watchdog(Mailbox(None, 0, 1), Limits(None, 60), None) as watch:
        with watch.during("forward"), contextlib.suppress(ValueError):
            raise ValueError("which is dealt with")
        with watch.during("saving"):
            raise dist.DistBackendError(OF_OTHERS[words])


@pytest.mark.parametrize("words", OWN)
def test_a_fault_of_its_own_is_not_a_lost_process(words: str) -> None:
    notices = Mailbox(None, 0, 1)
    with pytest.raises(dist.DistBackendError), Watchdog(notices, Limits(None, 60), None):
        raise dist.DistBackendError(OWN[words])


def test_first_failure_has_the_word() -> None:
    notices = Mailbox(None, 0, 1)
    with pytest.raises(ConfigError), Watchdog(notices, Limits(None, 60), None):
        raise ConfigError("CFG-001", "one", "two")
    failure = notices.failure()
    assert (failure.exit_code, failure.text) == (64, "error CFG-001: one Fix: two")
    with pytest.raises(EndedElsewhereError) as caught, Watchdog(notices, Limits(None, 60), None):
        raise ValueError("later")
    assert caught.value.exit_code == 64


def test_limits_by_phase() -> None:
    limits = Limits(None, ceiling=1600)
    steps = [30.0, 40.0, 50.0]
    assert limits.of("forward and backward", [], 0) == 1600  # before the second step: below the collectives' own
    assert limits.of("forward and backward", steps, 0) == 400
    assert limits.of("forward and backward", [1.0, 1.0], 0) == 120
    assert limits.of("saving", steps, 0) == 600
    assert limits.of("saving", steps, 300) == 900
    assert Limits(5, 1600).of("saving", steps, 300) == 5
    patient = Limits(5, 1600, {"saving": 40.0})
    assert patient.of("saving", steps, 0) == 40 and patient.of("waiting for data", steps, 0) == 5


def test_suspects_in_order() -> None:
    silent = Doing(3, "d", 5, "waiting for data", 40, 50.0, answers=False)
    stuck = Doing(1, "b", 5, "forward and backward", 41, 60.0, waits=False)
    behind = Doing(2, "c", 5, "forward and backward", 41, 60.0, waits=True)
    waiting = Doing(0, "a", 5, "reducing gradients", 42, 60.0, waits=True)
    assert [found.rank for found in by_suspicion([waiting, stuck, behind, silent])] == [3, 1, 2, 0]
    assert "Suspect: rank 3 on d, which does not answer" in str(hang([waiting, stuck, silent], 30, None))
    assert "All ranks wait for each other" in str(hang([waiting, waiting], 30, None))
    many = [Doing(rank, "n", waits=True) for rank in range(4096)]
    assert table(many).splitlines()[-1] == "... and 4064 more ranks"


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        ("SIGABRT", "watchdog over NCCL"),
        ("SIGKILL", "memory is the usual"),
        ("SIGSEGV", "A library has crashed"),
        ("SIGXCPU", "ulimit"),
    ],
)
def test_how_a_process_died_says_where_to_look(number: str, cause: str, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(f"import os, signal\nos.kill(os.getpid(), signal.{number})\n")
    words = ["--nproc-per-node", "1", "--master-port", ANY_PORT, str(script)]
    ended = command(launch.main, words, folder=tmp_path)
    assert ended.wait() == 74
    last = ended.said().splitlines()[-1]
    assert last.startswith("error RUN-004: Rank 0 (process ") and f"was ended by {number}." in last and cause in last
