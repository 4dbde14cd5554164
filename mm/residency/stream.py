"""Blocks' weights that are copied to the device ahead of the computation that needs them.

The blocks form a line that begins again where it ends, because forwards follow each other. Two places of device memory,
made once, hold two neighbours of the line. When a block has run, its place is let go of and at once given to the next
block of the line that is not on the device: this is the earliest moment at which two places can begin a copy, so no
copy is waited for that could have been hidden. The copy waits for the computation that reads its place, the computation
for the copy of its weights; the process itself waits for neither (`mm.device.queues`), only for files that are read.

A block that is asked for out of turn, as the first one after a forward that failed, begins the line anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from mm.device.queues import Queues, TransferEvent
from mm.residency.flat import FlatBlock
from mm.residency.plan import NUM_PLACES


class Waiting(NamedTuple):
    """A block's weights in host memory, uint8 [its bytes]; `place` is whom the memory is given back to."""

    memory: Tensor
    place: Any = None


class Source(Protocol):
    """Weights that wait, by the number in the line."""

    def take(self, number: int) -> Waiting:
        """Weights of a block, ready to be copied."""

    def give_back(self, waiting: Waiting, copied: Any) -> None:
        """Take the memory back; it may be written when the event has happened."""


class HostSource:
    """Weights of which each block has memory of its own, all the time.

    Args:
        memories: page-locked, uint8, by the number in the line.
    """

    def __init__(self, memories: Mapping[int, Tensor]) -> None:
        self._waiting = {number: Waiting(memory) for number, memory in memories.items()}

    def take(self, number: int) -> Waiting:
        """The block's memory."""
        return self._waiting[number]

    def give_back(self, waiting: Waiting, copied: Any) -> None:
        """Nobody else uses it."""
        del waiting, copied


class _Place:
    """Device memory for one block of the line at a time.

    Attributes:
        memory: uint8. views: parameters of every block of the line as views of it.
        holds: number of the block whose copy into it has begun; None for none.
        copied: event behind that copy. used: event behind the computation that read it last.
    """

    def __init__(self, memory: Tensor, line: Sequence[FlatBlock]) -> None:
        self.memory = memory
        self.views: list[tuple[nn.Parameter, ...]] = [block.views(memory) for block in line]
        self.parts = [memory[: block.size.num_bytes] for block in line]
        self.holds: int | None = None
        self.copied: Any = None
        self.used: Any = None


class WeightStream:
    """The line of blocks whose weights are copied, and the places that they are copied to.

    Attributes:
        copies: how often each block of the line was copied. out_of_turn: how often the line began anew.
    """

    def __init__(
        self,
        queues: Queues,
        line: Sequence[FlatBlock],
        sources: Sequence[Source],
        timeline: list[TransferEvent] | None = None,
    ) -> None:
        """Make the places; nothing is copied before `begin_at`.

        Args:
            queues: of the device. line: more blocks than places, in the order in which they run.
            sources: of each of them. timeline: if given, what is told to the queues is appended to it.
        """
        if len(line) <= NUM_PLACES:
            raise ValueError(f"{len(line)} blocks take turns in {NUM_PLACES} places")
        self._queues, self._line, self._sources, self._timeline = queues, line, sources, timeline
        size = max(block.size.num_bytes for block in line)
        memory = queues.device_memory(NUM_PLACES * size)
        self._places = [_Place(part, line) for part in memory.split(size)]
        self._next = 0
        self._entered: int | None = None
        self.copies: Counter[int] = Counter()
        self.out_of_turn = 0
        for block in line:
            block.wait()

    def begin_at(self, number: int) -> None:
        """Fill the places with a block and those behind it, whatever they hold."""
        self._next = number
        event = self._queues.record("compute")  # of a forward that failed, too
        for place in self._places:
            place.used = event
            self._fill(place)

    def enter(self, number: int) -> None:
        """A block is about to run: the computation waits for its weights, and the block gets them.

        Raises what reading the weights of the next ones raises, where they are in files.
        """
        block = self._line[number]
        if self._entered is not None:
            self._line[self._entered].take_away()  # its forward failed
        place = self._place_of(number)
        if place is None:
            self.out_of_turn += 1
            self.begin_at(number)
            place = self._places[0]
        self._note("needed", number)
        self._queues.wait("compute", place.copied)
        block.put(place.views[number])
        self._entered = number

    def leave(self, number: int) -> None:
        """A block has run: its place takes the next block of the line."""
        place = self._place_of(number)
        if place is None or self._entered != number:
            raise AssertionError("a block is left that was not entered")
        self._line[number].take_away()
        self._entered = None
        place.used = self._queues.record("compute")
        self._note("released", number)
        self._fill(place)

    def _place_of(self, number: int) -> _Place | None:
        return next((place for place in self._places if place.holds == number), None)

    def _fill(self, place: _Place) -> None:
        """Begin the copy of the next block of the line into a place."""
        number, source = self._next, self._sources[self._next]
        self._next = (number + 1) % len(self._line)
        place.holds = None  # while a file is read, which may fail
        waiting = source.take(number)
        self._note("to device", number)
        self.copies[number] += 1
        self._queues.wait("to device", place.used)
        self._queues.copy("to device", place.parts[number], waiting.memory)
        place.copied = self._queues.record("to device")
        place.holds = number
        source.give_back(waiting, place.copied)

    def _note(self, action: str, number: int) -> None:
        if self._timeline is not None:
            copy = self.copies[number] - (action != "to device")
            self._timeline.append(TransferEvent(action, copy, number))
