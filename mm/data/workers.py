"""Reading in processes of their own: in order, with a time limit, surviving the death of a reader.

A decoder can hang, crash, or be killed for its memory, and a thread cannot be ended. So what is read goes through
long-lived processes, each with one job at a time. They come from a fork server, which has neither the devices nor the
threads of this process. A reader puts tensors into memory that this process made and shares; the rest it sends as JSON:
nothing that comes back is pickled. Where a reader dies, another one gets its job again; a second death is an error.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import psutil
import torch
from torch import Tensor

from mm.config.units import format_bytes
from mm.data.fork_server import SENT_TO_ALL, ensure_fork_server, without_main
from mm.data.shared import SharedMemory
from mm.errors import DataError, DiskError, Problem, raise_all

START_SECONDS = 300.0  # for a reader to import what it needs, perhaps from a busy network disk
_END_SECONDS = 5.0  # for a killed reader to be gone; longer only where the kernel waits for a disk
_ALIGNMENT = 64
_READY = b"ready"

JobT = TypeVar("JobT")
WorkT = TypeVar("WorkT", contravariant=True)


@dataclass(frozen=True)
class Parcel:
    """Result of a job: tensors by name, and facts that JSON can spell."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


Outcome = Parcel | DataError


class Work(Protocol[WorkT]):
    """Work of readers; it is sent to each of them once, when it starts."""

    def __call__(self, job: WorkT, /) -> Parcel:
        """Do one job; a `DataError` becomes its outcome, another exception ends the reader."""

    def describe(self, job: WorkT, /) -> str:
        """Name of a job where its reader hangs or dies: its file."""


def read_in_order(
    work: Work[JobT],
    jobs: Iterable[JobT],
    *,
    num_workers: int,
    time_limit: float,
    buffer_bytes: int,
    again: Callable[[JobT, Outcome], JobT | None] | None = None,
) -> Generator[tuple[JobT, Outcome]]:
    """Do jobs in other processes and give the outcomes in the jobs' order, `num_workers` of them ahead.

    Args:
        work: what is done with a job.
        jobs: small, since they are sent; perhaps without end.
        num_workers: reading processes; 0 reads in this one, where nothing can end a read that hangs.
        time_limit: seconds for one job.
        buffer_bytes: the most that the tensors of one job take; see `bytes_to_share`.
        again: given a job and its outcome, another job to do in its place, or None to accept the outcome.

    Yields:
        The job (the last one that `again` gave) with what it gave, or the `DataError` it ended with: one of `work`,
        DATA-070 when time was up, DATA-071 when its reader died twice.
    """
    if num_workers == 0:
        for job in jobs:
            yield _until_accepted(job, lambda job: _attempt(work, job), again)
        return
    readers: deque[_Reader[JobT]] = deque()
    remaining = iter(jobs)
    try:
        for job in islice(remaining, num_workers):
            reader = _Reader(work, buffer_bytes, time_limit)
            readers.append(reader)
            reader.give(job)
        while readers:
            reader = readers.popleft()
            try:
                job, outcome = _until_accepted(reader.job, reader.outcome_of, again)
            except BaseException:
                reader.close()
                raise
            following = list(islice(remaining, 1))
            if following:
                readers.append(reader)
                reader.give(following[0])
            else:
                reader.close()
            yield job, outcome
    finally:
        for reader in readers:
            reader.close()


def bytes_to_share(*shapes: tuple[int, ...]) -> int:
    """Bytes to share for tensors of these shapes, whatever floating-point type of up to 32 bits they have."""
    return sum(4 * torch.Size(shape).numel() + _ALIGNMENT for shape in shapes)


def as_facts(problems: Iterable[Problem]) -> list[list[str]]:
    """Problems as JSON can spell them."""
    return [[problem.id, problem.message, problem.remedy] for problem in problems]


def as_error(facts: Iterable[Iterable[str]]) -> DataError:
    """The inverse of `as_facts`."""
    try:
        raise_all(DataError, [Problem(*problem) for problem in facts])
    except DataError as error:
        return error
    raise ValueError("an error without problems")


def _until_accepted(
    job: JobT, outcome_of: Callable[[JobT], Outcome], again: Callable[[JobT, Outcome], JobT | None] | None
) -> tuple[JobT, Outcome]:
    while True:
        outcome = outcome_of(job)
        other = again(job, outcome) if again else None
        if other is None:
            return job, outcome
        job = other


def _attempt(work: Work[JobT], job: JobT) -> Outcome:
    try:
        return work(job)
    except DataError as error:
        return error


class _Reader(Generic[JobT]):
    """One reading process, its shared memory, and the job that it has."""

    def __init__(self, work: Work[JobT], buffer_bytes: int, time_limit: float) -> None:
        self._work = work
        self._time_limit = time_limit
        self._context = multiprocessing.get_context("forkserver")
        with _refusals():
            self._buffer = SharedMemory(max(1, buffer_bytes))
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._ready = False
        self._given = 0.0
        self.job: JobT

    def give(self, job: JobT) -> None:
        """Start on a job."""
        if self._process is None:
            with _refusals():
                ours, theirs = self._context.Pipe()
                # what readers need is imported once, not by every one of them
                ensure_fork_server([__name__, type(self._work).__module__])
                process = self._context.Process(target=_serve, args=(self._work, theirs, self._buffer), daemon=True)
                with without_main():
                    process.start()
                theirs.close()
            self._process, self._connection, self._ready = process, ours, False
        assert self._connection is not None  # noqa: S101  made with the process
        self.job, self._given = job, time.monotonic()
        with suppress(OSError):  # a reader that died meanwhile is found when its outcome is asked for
            self._connection.send(job)

    def outcome_of(self, job: JobT) -> Outcome:
        """Wait for a job, which is given first if it is not the one that the reader has; a dead reader is replaced."""
        if job is not self.job:
            self.give(job)
        for last in (False, True):
            try:
                return self._answer()
            except EOFError:
                died = self._died()
                if last:
                    return died
                self.give(self.job)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the process, whatever it is doing; another job starts another."""
        if self._process is not None and self._connection is not None:
            self._process.kill()
            self._process.join(_END_SECONDS)
            self._connection.close()
        self._process = self._connection = None

    def _answer(self) -> Outcome:
        """Raises EOFError when the process is dead."""
        assert self._process is not None and self._connection is not None  # noqa: S101  it has a job
        try:
            if not self._ready:
                if not self._connection.poll(START_SECONDS):
                    return self._timed_out("did not start", START_SECONDS)
                self._connection.recv_bytes()
                self._ready, self._given = True, time.monotonic()
            if not self._connection.poll(max(0.0, self._given + self._time_limit - time.monotonic())):
                return self._timed_out("gave nothing", self._time_limit)
            answer = json.loads(self._connection.recv_bytes())
        except OSError:  # the end of the pipe in the middle of a message
            raise EOFError from None
        if "problems" in answer:
            return as_error(answer["problems"])
        return Parcel(_unpack(answer["tensors"], self._buffer.bytes), answer["facts"])

    def _timed_out(self, what: str, seconds: float) -> DataError:
        self.close()
        return DataError(
            "DATA-070",
            f"{self._work.describe(self.job)}: its reader {what} in {seconds:g} s and was ended.",
            "Replace the file or, if it is a long video or its disk is slow, allow more time.",
        )

    def _died(self) -> DataError:
        assert self._process is not None  # noqa: S101  it has died
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        how = _signal_name(-code) if code is not None and code < 0 else f"exit code {code}"
        self.close()
        free = f"{format_bytes(psutil.virtual_memory().available)} of memory"
        return DataError(
            "DATA-071",
            f"{self._work.describe(self.job)}: the process that read it died twice, of {how}; {free} is free.",
            "After SIGKILL or SIGBUS lower --num-workers or free memory; if it is always this file, replace it.",
        )


def _signal_name(number: int) -> str:
    known = {member.value: member.name for member in signal.Signals}
    return known.get(number, f"signal {number}")


@contextmanager
def _refusals() -> Iterator[None]:
    """Tell what the system refuses to a reader that is to start, such as its socket in a full TMPDIR.

    Raises:
        DiskError: RUN-020.
    """
    try:
        yield
    except (OSError, EOFError) as error:
        raise DiskError(
            "RUN-020",
            f"A reader cannot be started: {error or type(error).__name__} (folder for temporary files: "
            f"{tempfile.gettempdir()}).",
            "Free space and inodes there, set TMPDIR to a folder on another disk, or free memory.",
        ) from None


def _serve(work: Work[Any], connection: Connection, buffer: SharedMemory) -> None:
    """A reader's life: jobs in, answers out, until the process that wants them is gone."""
    for name in SENT_TO_ALL:
        signal.signal(name, signal.SIG_IGN)
    with suppress(OSError):  # Linux: where memory runs out a reader goes first, which can be replaced
        Path("/proc/self/oom_score_adj").write_text("1000")
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    connection.send_bytes(_READY)
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionError):  # of a parent that was killed
            return
        outcome = _attempt(work, job)
        if isinstance(outcome, DataError):
            answer: dict[str, Any] = {"problems": as_facts(outcome.problems)}
        else:
            answer = {"tensors": _pack(outcome.tensors, buffer.bytes), "facts": dict(outcome.facts)}
        connection.send_bytes(json.dumps(answer).encode())


def _leave_with_parent() -> None:
    """A reader in the middle of a job, or one that hangs in a decoder, must not outlive a killed parent."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(0)


def _pack(tensors: Mapping[str, Tensor], buffer: Any) -> dict[str, Any]:
    """Copy tensors into shared memory; returns [dtype, shape, offset] by name."""
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        _view(buffer, tensor.dtype, tensor.shape, offset).copy_(tensor)
        entries[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset]
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return entries


def _unpack(entries: Mapping[str, Any], buffer: Any) -> dict[str, Tensor]:
    """Tensors of our own, since the reader writes its next ones to the same place."""
    return {
        name: _view(buffer, getattr(torch, dtype), shape, offset).clone()
        for name, (dtype, shape, offset) in entries.items()
    }


def _view(buffer: Any, dtype: torch.dtype, shape: Iterable[int], offset: int) -> Tensor:
    size = torch.Size(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=size.numel(), offset=offset).view(size)
