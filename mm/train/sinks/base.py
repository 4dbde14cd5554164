"""Sinks of records, apart from what is measured: a sink takes every record and shows what it can show of it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mm.train.records import Record

Write = Callable[[Sequence[Record]], None]
"""Hands records to all sinks of a run."""


class Sink(abc.ABC):
    """A place for records, on the rank that reports (0).

    A sink that loses its place, a disk or a server, says so and goes on without it: no run ends for want of a curve.
    """

    def begin(self, first_step: int, total_steps: int) -> None:  # noqa: B027  not every place is opened
        """Open the place; what an earlier run has left of `first_step` and later ones will come again."""

    @abc.abstractmethod
    def write(self, record: Record) -> None:
        """Take a record."""

    def close(self) -> None:  # noqa: B027  the same
        """Close the place; called for every sink that has begun, however the run ends."""


@contextmanager
def opened(sinks: Sequence[Sink], first_step: int, total_steps: int) -> Iterator[Write]:
    """Begin with all sinks, and close them in the reverse order."""

    def write(records: Sequence[Record]) -> None:
        for record in records:
            for sink in sinks:
                sink.write(record)

    with ExitStack() as stack:
        for sink in sinks:
            sink.begin(first_step, total_steps)
            stack.callback(sink.close)
        yield write
