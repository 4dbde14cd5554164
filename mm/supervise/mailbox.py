"""Mailbox of a job's processes outside of collectives, in the launcher's key-value store.

Two things are told: that the run has failed, by the first process to fail, so that its message is the one that is
printed; and that a process makes no progress (`mm.supervise.watchdog`). Reading never waits: a key is there or not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from mm.errors import EXIT_INTERNAL
from mm.supervise.messages import Messages

RecordT = TypeVar("RecordT")


@dataclass(frozen=True)
class Failure:
    """The first failure of a job: of which rank, the exit code for all processes, what was printed.

    A code that says success, or that no process can leave with, becomes that of a defect.
    """

    rank: int
    exit_code: int
    text: str

    def __post_init__(self) -> None:
        if not (isinstance(self.exit_code, int) and 0 < self.exit_code < 256):
            object.__setattr__(self, "exit_code", EXIT_INTERNAL)


def as_record(kind: type[RecordT], told: Any) -> RecordT | None:
    """A record from what was told of its fields; None where it says something else, as only a forged message can."""
    try:
        return None if told is None else kind(**told)
    except TypeError:
        return None


class Mailbox:
    """A process's view of what was told in this start of the job. Threads may share it.

    Args:
        messages: over a client of its own, with a short time limit; None where the job is one process.
        rank, world_size: of this process and the job.
        remember: called with exit code and text of the job's first failure, for a start after this one.
    """

    def __init__(
        self,
        messages: Messages | None,
        rank: int,
        world_size: int,
        remember: Callable[[int, str], None] = lambda exit_code, text: None,
    ) -> None:
        self._messages, self.rank, self.world_size, self._remember = messages, rank, world_size, remember
        self._lock = threading.Lock()
        self._mine: dict[str, Any] = {}

    def claim(self, name: str, value: Any) -> bool:
        """Tell `value`, unless another process has told something under this name; whether this one was first.

        Raises:
            StoreLostError: the store does not answer.
        """
        if self._messages is None:
            first = name not in self._mine
            self._mine.setdefault(name, value)
            return first
        with self._lock, _answering():
            return self._messages.claim(name, value)

    def write(self, name: str, value: Any) -> None:
        """Tell `value` under a name that only this process uses, over what it told before; raises as `claim`."""
        if self._messages is None:
            self._mine[name] = value
            return
        with self._lock, _answering():
            self._messages.write(name, value)

    def read(self, name: str) -> Any | None:
        """Message under a name, or None; raises as `claim`."""
        if self._messages is None:
            return self._mine.get(name)
        with self._lock, _answering():
            return self._messages.read(name)

    def record(self, kind: type[RecordT], name: str) -> RecordT | None:
        """Message under a name, as `as_record` reads it; raises as `claim`."""
        return as_record(kind, self.read(name))

    def append(self, name: str, value: Any) -> None:
        """Add a value to what other processes read as a `roll`; raises as `claim`."""
        if self._messages is not None:
            with self._lock, _answering():
                self._messages.append(name, value)

    def roll(self, name: str) -> list[Any]:
        """Messages that the processes of the job have added under a name; raises as `claim`."""
        if self._messages is None:
            return []
        with self._lock, _answering():
            return self._messages.roll(name)

    def publish(self, failure: Failure) -> bool:
        """Tell the job that it has failed; whether this is its first failure, which is the one to print."""
        try:
            first = self.claim("failure", asdict(failure))
            if first:
                self._remember(failure.exit_code, failure.text)
            return first
        except StoreLostError:  # better two messages than none
            return True

    def failure(self) -> Failure | None:
        """The job's first failure so far; raises as `claim`."""
        return self.record(Failure, "failure")


class StoreLostError(Exception):
    """The launcher's store does not answer within the time limit of the client."""


class _answering:  # noqa: N801  (reads as a statement: with _answering())
    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, dist.DistError):
            raise StoreLostError(str(error).splitlines()[0]) from None
