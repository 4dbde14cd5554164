"""Saving while training goes on: the loop waits for a copy in host memory, a thread writes it and commits.

The thread runs `mm.checkpoint.store.save` as it is, with the same order of steps, so a process that dies at any moment
leaves what it would have left otherwise. It talks to the other ranks over a group of its own: messages of the training
and of the saving cannot meet. One save at a time: the next one waits for the one before.

The copies lie in one block of host memory, made once. A block for each tensor would be 1.4 to 1.8 times as much where
it is page-locked: torch's allocator of page-locked memory rounds each up to a power of two.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.comm import Comm
from mm.checkpoint.lock import Lock
from mm.checkpoint.pieces import Piece
from mm.checkpoint.store import Derived, save

log = logging.getLogger(__name__)

_TELL_S = 60.0
"""How often a log line says that a save is waited for."""

PAGE = 4096
"""Bytes; every tensor's copy begins at a multiple."""


def copy_bytes(pieces: Iterable[Piece]) -> int:
    """Host memory that the copies of pieces take."""
    return sum(math.ceil(piece.tensor.nbytes / PAGE) * PAGE for piece in pieces)


def plain_memory(num_bytes: int) -> Tensor:
    """Host memory as uint8 [num_bytes] that is not page-locked."""
    return torch.empty(num_bytes, dtype=torch.uint8)


@dataclass(frozen=True)
class SaveTimes:
    """Times of one save, in seconds of `time.monotonic`.

    Attributes:
        step: that was saved.
        called, copied: the loop stood still between these.
        committed: the checkpoint got its name.
    """

    step: int
    called: float
    copied: float
    committed: float


class BackgroundSaver:
    """Saves of one run; a context manager that lets the last one finish.

    Attributes:
        times: of the saves that are done.
    """

    def __init__(
        self,
        root: Path,
        comm: Comm,
        host_memory: Callable[[int], Tensor] = plain_memory,
        lock: Lock | None = None,
    ) -> None:
        """Save below `root`, inside `mm.checkpoint.store.writing(root)`.

        Args:
            root: the folder of the run's checkpoints.
            comm: the ranks, over a group that nothing else uses.
            host_memory: makes uint8 [num_bytes] for the copies, page-locked where there is an accelerator.
            lock: what `writing` gave.
        """
        self._root, self._comm, self._host_memory, self._lock = root, comm, host_memory, lock
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._copies: list[Piece] = []  # of the last save, in the memory that the next one takes
        self.times: list[SaveTimes] = []

    def start(
        self,
        step: int,
        pieces: Iterable[Piece],
        scalars: dict[str, Any],
        keep_latest: int | None = None,
        derived: Derived | None = None,
    ) -> None:
        """Copy what is to be saved and return; arguments as for `mm.checkpoint.store.save`.

        Raises:
            CheckpointError: of the save before, which it waits for.
        """
        self.finish()
        called = time.monotonic()
        copies = self._copied(pieces)
        copied = time.monotonic()

        def write() -> None:
            try:
                parts = self._root, step, copies, scalars, self._comm
                save(*parts, keep_latest=keep_latest, derived=derived, lock=self._lock)
                self.times.append(SaveTimes(step, called, copied, time.monotonic()))
            except BaseException as error:  # raised in the loop, by `check` or `finish`
                self._failure = error

        # A daemon: a run that ends by an error does not wait for ranks that may be gone.
        self._thread = threading.Thread(target=write, name=f"save of step {step}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a save that has failed; the same on every rank, though not at the same step."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until the save that runs is committed.

        Raises:
            CheckpointError: of that save.
        """
        if self._thread is None:
            return
        self._thread.join(_TELL_S)
        while self._thread.is_alive():
            log.info("waiting for the %s, which is being written in the background", self._thread.name)
            self._thread.join(_TELL_S)
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        last = self.times[-1]
        log.info(
            "checkpoint of step %d committed; the loop stood still for %.2f s of %.1f s",
            last.step,
            last.copied - last.called,
            last.committed - last.called,
        )

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()

    def _copied(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with copies of their data in host memory, in the same memory each time."""
        pieces = list(pieces)
        if list(map(_kind, pieces)) != list(map(_kind, self._copies)):
            self._copies = []  # let go of before there is more
            self._copies = _placed(pieces, self._host_memory)
        for piece, copy in zip(pieces, self._copies, strict=True):
            copy.tensor.copy_(piece.tensor.detach(), non_blocking=True)
        if any(piece.tensor.device.type != "cpu" for piece in pieces):
            torch.accelerator.synchronize()  # the thread reads what the device still writes otherwise
        return self._copies


def _kind(piece: Piece) -> tuple[object, ...]:
    return piece.key, piece.box, piece.tensor.dtype


def _placed(pieces: Sequence[Piece], host_memory: Callable[[int], Tensor]) -> list[Piece]:
    """The pieces with tensors of the same shape and dtype, one after the other in one block."""
    if not pieces:  # nothing of this rank is saved
        return []
    memory, end, placed = host_memory(copy_bytes(pieces)), 0, []
    for piece in pieces:
        part = memory[end : end + piece.tensor.nbytes]
        placed.append(replace(piece, tensor=part.view(piece.tensor.dtype).view(piece.tensor.shape)))
        end += copy_bytes([piece])
    return placed
