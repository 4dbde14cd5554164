"""Weights of blocks that are read from files each time, into a ring of page-locked memory.

One thread reads, one block after the other in the order of the line, as far ahead as there is memory: while a block is
copied to the device from one piece, the next one is read into the other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mm.device.queues import Queues
from mm.residency.plan import NUM_PLACES
from mm.residency.stream import Waiting

ReadBlock = Callable[[int, Tensor], None]
"""(number in the line, uint8 [its bytes]) writes the block's weights, as they are used, to the memory."""


class _Piece:
    """Host memory for one block at a time; `copied` is the event behind the copy that reads it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.copied: Any = None


class FileSource:
    """The `mm.residency.stream.Source` of blocks that are read from files.

    Args:
        queues: of the device.
        line: numbers of the blocks, in order. sizes: bytes of each.
        read: reads one; what it raises is raised where the block is taken.
    """

    def __init__(self, queues: Queues, line: Sequence[int], sizes: Sequence[int], read: ReadBlock) -> None:
        self._queues, self._line, self._read = queues, line, read
        self._sizes = dict(zip(line, sizes, strict=True))
        memory = queues.host_memory(NUM_PLACES * max(sizes))
        self._free = [_Piece(part) for part in memory.split(max(sizes))]
        self._asked: deque[tuple[int, _Piece, Future[None]]] = deque()
        self._next = 0
        self._thread = ThreadPoolExecutor(1, "weights")

    def take(self, number: int) -> Waiting:
        """The block's weights; the process waits until they are read. Raises what reading them raises."""
        if not self._asked or self._asked[0][0] != number:
            self._begin_at(number)
        _, piece, reading = self._asked.popleft()
        try:
            reading.result()
        except BaseException:
            self._free.append(piece)
            self._forget()  # of what is behind it some may have failed likewise; it is read again when it is asked for
            raise
        return Waiting(piece.memory[: self._sizes[number]], piece)

    def give_back(self, waiting: Waiting, copied: Any) -> None:
        """Take the memory back: it is written again when it has been copied."""
        piece: _Piece = waiting.place
        piece.copied = copied
        self._free.append(piece)
        self._ask()

    def _begin_at(self, number: int) -> None:
        """Read from a block of the line on."""
        self._forget()
        self._next = self._line.index(number)
        self._ask()

    def _forget(self) -> None:
        """Drop what is being read."""
        for _, piece, reading in self._asked:
            if not reading.cancel():
                reading.exception()  # waits; nobody asks for the block any more
            self._free.append(piece)
        self._asked.clear()

    def _ask(self) -> None:
        """Read on, as far as there is memory."""
        while self._free:
            piece, number = self._free.pop(0), self._line[self._next]
            self._next = (self._next + 1) % len(self._line)
            self._asked.append((number, piece, self._thread.submit(self._read_into, piece, number)))

    @torch.no_grad()
    def _read_into(self, piece: _Piece, number: int) -> None:
        if piece.copied is not None:
            self._queues.finish(piece.copied)
        self._read(number, piece.memory[: self._sizes[number]])
