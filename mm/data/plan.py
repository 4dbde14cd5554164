"""The sampling plan: which samples each step trains on, a function of the seed and the step alone (D14 of the design).

Training walks along slots 0, 1, 2, ... without end, each filled by a group: as many samples as a micro-batch of their
source has, all of one bucket (samples of one shape of one source). Step k takes the next groups, whatever the layout:
replicas share them out (`mm.data.sampler`). Nothing here grows with the number of samples, and nothing is replayed: any
slot is computed by itself, from keyed bijections (`mm.data.bijection`) in place of lists.

- A bucket's samples are walked through without end: epoch e of n samples is the positions e n to (e + 1) n, in an order
  of its own. The epoch is the sample's draw, the key of its random numbers.
- A source's groups of an epoch come in an order of their own; samples that are left over of a bucket, too few for a
  group, come first in its next epoch. With one bucket the groups are the walk itself, whatever their size.
- A source may hold K draws of each of its samples (other clips of one video): its epoch e takes draw e mod K, and what
  is left over of a bucket comes first in the next epoch of that draw.
- Sources are mixed by weight, exactly in every 4,096 slots to a group: which slots are whose is drawn for each such
  block, and each source's groups come in their own order.
- An epoch of the plan is as many slots as the sources that are open have groups, each repeated as it asks for, whatever
  their weights: with weights of 1 each sample comes once in it for each repeat. A source that opens or closes within an
  epoch changes the length of what is left of it. What begins or ends with an epoch does so at the first step that has
  nothing of the epoch before.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from mm.data.bijection import KeyedBijection
from mm.rng import key

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample at its place in the plan.

    Attributes:
        index: in the data set. draw: how often it came before, in any of its draws; the key of its random numbers.
        walk: (source, bucket). position: in that bucket's walk.
        place: in the step that it is dealt in, from 0, and the samples of that step.
    """

    index: int
    draw: int
    walk: tuple[int, int]
    position: int
    place: tuple[int, int] = field(default=(0, 1), compare=False, repr=False)


@dataclass(frozen=True)
class Bucket:
    """Samples of a source that may share a micro-batch.

    Attributes:
        name: stable, the key of its order. size: number of samples, at least 1.
        member: index in the data set of the k-th of them. tokens: transformer tokens of the k-th of them.
        draw: of the samples, that they are of.
    """

    name: str
    size: int
    member: Callable[[int], int]
    tokens: Callable[[int], int]
    draw: int = 0


@dataclass(frozen=True)
class PlannedSource:
    """One source of samples.

    Attributes:
        buckets: at least one of each draw, all draws with as many samples. group_size: samples of a slot.
        draws: K, that it holds of each sample.
        repeats: passes over its samples in an epoch of the plan.
        weight: of its share of the samples, beside that by its size. 1 for all: each comes as often as its size says.
        begin: first slot that it may fill. end: first slot that it may not fill any more; None for no end.
        begin_epoch: epochs of the plan that must be over before it may fill a slot. end_epoch: those after which it may
            not any more; None for no end.
    """

    buckets: Sequence[Bucket]
    group_size: int = 1
    draws: int = 1
    repeats: int = 1
    weight: Fraction = Fraction(1)
    begin: int = 0
    end: int | None = None
    begin_epoch: int = 0
    end_epoch: int | None = None

    def is_open(self, slot: int, epochs: Fraction) -> bool:
        """Tell whether it may fill a slot, before which so many epochs of the plan are over."""
        begun = self.begin <= slot and self.begin_epoch <= epochs
        return begun and (self.end is None or slot < self.end) and (self.end_epoch is None or epochs < self.end_epoch)

    @property
    def groups_of_epoch(self) -> Fraction:
        """Groups that its samples fill in an epoch of the plan, each as often as it is repeated."""
        return Fraction(self.repeats * sum(bucket.size for bucket in self.buckets), self.group_size * self.draws)


class SamplingPlan:
    """Samples of every slot, for all sources together."""

    def __init__(
        self, sources: Sequence[PlannedSource], seed: int, *, shuffle: bool = True, slots_of_step: int = 1
    ) -> None:
        """Take the sources.

        Args:
            sources: at least one.
            seed: of all orders. shuffle: whether orders are drawn; otherwise samples come as they are listed, bucket by
                bucket, source by source.
            slots_of_step: of which a number comes before whatever begins or ends with an epoch.
        """
        self._group_sizes = [source.group_size for source in sources]
        self._walks = [[_Walk(bucket, source.draws, seed, shuffle) for bucket in source.buckets] for source in sources]
        self._sources = [_SourceGroups(source, number, seed, shuffle) for number, source in enumerate(sources)]
        self._phases = list(_phases(sources, slots_of_step))
        self._seed, self._shuffle = seed, shuffle
        self._blocks = lru_cache(maxsize=2)(self._block)

    @property
    def is_even(self) -> bool:
        """Tell whether all slots have as many samples."""
        return len(set(self._group_sizes)) == 1

    @property
    def end(self) -> int | None:
        """The first slot at which no source is open; None where there is none. The plan has no slots from there on."""
        return self._phases[-1].end if self._phases else 0

    def open_slots(self, source: int) -> tuple[int, int | None] | None:
        """The first slot at which a source is open, and that from which it is not any more; None where it never is."""
        phases = [phase for phase in self._phases if source in phase.sources]
        return (phases[0].begin, phases[-1].end) if phases else None

    def group(self, slot: int) -> list[PlannedSample]:
        """The samples of a slot; raises IndexError for one that the plan does not have."""
        walk, position = self._walk_at(slot)
        return [self._sample(walk, position + i) for i in range(self._group_sizes[walk[0]])]

    def tokens(self, slot: int) -> list[int]:
        """Transformer tokens of each sample of a slot, for which no sample is looked up; raises as `group`."""
        (source, bucket), position = self._walk_at(slot)
        walk = self._walks[source][bucket]
        return [walk.tokens_at(position + i) for i in range(self._group_sizes[source])]

    def groups_of_sources(self, slots: int) -> list[int]:
        """Number of the first slots that each source fills; exact where blocks end, else as its share says."""
        filled = [0] * len(self._walks)
        for phase in self._phases:
            end = slots if phase.end is None else min(slots, phase.end)
            if end > phase.begin:
                for source, count in zip(phase.sources, phase.counts(end - phase.begin), strict=True):
                    filled[source] += count
        return filled

    def next_in_epoch(self, sample: PlannedSample) -> PlannedSample:
        """The sample that follows one in its bucket's epoch, the first after the last; its draw stays."""
        size = self._walks[sample.walk[0]][sample.walk[1]].size
        epoch, place = divmod(sample.position, size)
        return self._sample(sample.walk, epoch * size + (place + 1) % size)

    def _sample(self, walk: tuple[int, int], position: int) -> PlannedSample:
        index, epoch = self._walks[walk[0]][walk[1]].at(position)
        return PlannedSample(index, epoch, walk, position)

    def _walk_at(self, slot: int) -> tuple[tuple[int, int], int]:
        """The walk that fills a slot, and the position at which its group begins."""
        if slot < 0 or (self.end is not None and slot >= self.end):
            raise IndexError(f"the plan has no slot {slot}; it ends at {self.end}")
        source, number = self._source_at(slot)
        bucket, position = self._sources[source].group(number)
        return (source, bucket), position

    def _source_at(self, slot: int) -> tuple[int, int]:
        """The source of a slot, and how many of its groups came before."""
        number = bisect_right([phase.begin for phase in self._phases], slot) - 1
        phase = self._phases[number]
        if len(phase.sources) == 1:
            return phase.sources[0], phase.before[0] + slot - phase.begin
        block, place = divmod(slot - phase.begin, _BLOCK)
        return self._blocks(number, block)[place]

    def _block(self, number: int, block: int) -> list[tuple[int, int]]:
        """The source of each slot of a block of a phase, and how many of its groups came before."""
        phase = self._phases[number]
        begin, end = block * _BLOCK, phase.end_of_block(block)
        done, until = phase.counts(begin), phase.counts(end)
        ends = list(accumulate(b - a for a, b in zip(done, until, strict=True)))
        order = _order(end - begin, self._seed, f"mixture {number}", block, self._shuffle)
        found = []
        for place in range(end - begin):
            which = bisect_right(ends, order(place))
            found.append((phase.sources[which], phase.before[which] + done[which]))
            done[which] += 1
        return found


class _Walk:
    """The endless walk through one bucket."""

    def __init__(self, bucket: Bucket, draws: int, seed: int, shuffle: bool) -> None:
        self.size = bucket.size
        self._draws = draws
        self._bucket = bucket
        self._order = lru_cache(maxsize=2)(lambda epoch: _order(bucket.size, seed, bucket.name, epoch, shuffle))

    def at(self, position: int) -> tuple[int, int]:
        """The index of the sample at a position, and how often it came before in any draw."""
        passes = position // self.size * self._draws + self._bucket.draw
        return self._bucket.member(self._number_at(position)), passes

    def tokens_at(self, position: int) -> int:
        """The tokens of the sample at a position."""
        return self._bucket.tokens(self._number_at(position))

    def _number_at(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        return self._order(epoch)(place)


class _SourceGroups:
    """The endless sequence of one source's groups."""

    def __init__(self, source: PlannedSource, number: int, seed: int, shuffle: bool) -> None:
        self._sizes = [bucket.size * source.repeats for bucket in source.buckets]
        self._draw_of = [bucket.draw for bucket in source.buckets]
        self._draws = source.draws
        self._of_epoch = max(
            sum(size for size, draw in zip(self._sizes, self._draw_of, strict=True) if draw == one)
            for one in range(source.draws)
        )
        self._group_size = source.group_size
        self._order = lru_cache(maxsize=2)(
            lambda epoch, size: _order(size, seed, f"groups of source {number}", epoch, shuffle)
        )
        self._epochs = lru_cache(maxsize=4)(self._epoch)

    def group(self, number: int) -> tuple[int, int]:
        """The bucket of a group, and the position in its walk at which the group begins."""
        if len(self._sizes) == 1:
            return 0, number * self._group_size
        epoch = number * self._group_size // self._of_epoch  # or a later one, by what was left over before
        while (found := self._epochs(epoch)).first + found.ends[-1] <= number:
            epoch += 1
        rank = self._order(epoch, found.ends[-1])(number - found.first)
        bucket = bisect_right(found.ends, rank)
        in_epoch = rank - (found.ends[bucket - 1] if bucket else 0)
        return bucket, (found.before[bucket] + in_epoch) * self._group_size

    def _epoch(self, epoch: int) -> _Epoch:
        before, until = self._groups_before(epoch), self._groups_before(epoch + 1)
        return _Epoch(sum(before), before, list(accumulate(b - a for a, b in zip(before, until, strict=True))))

    def _groups_before(self, epoch: int) -> list[int]:
        """Whole groups of each bucket before an epoch."""
        passes = ((epoch - draw + self._draws - 1) // self._draws for draw in self._draw_of)
        return [count * size // self._group_size for count, size in zip(passes, self._sizes, strict=True)]


@dataclass(frozen=True)
class _Epoch:
    """Groups of one source in an epoch of the plan: kept, since a source may have thousands of buckets.

    Attributes:
        first: number of the first. before: whole groups of each bucket before. ends: of each bucket's groups in it.
    """

    first: int
    before: list[int]
    ends: list[int]


@dataclass(frozen=True)
class _Phase:
    """Slots in which the same sources are open.

    Attributes:
        begin: the first slot. end: the one after the last; None for no end.
        sources: which. before: groups that each filled earlier. shares: upper bounds of the sources' shares of [0, 1].
    """

    begin: int
    end: int | None
    sources: list[int]
    before: list[int]
    shares: list[Fraction]

    def end_of_block(self, block: int) -> int:
        """The slot after a block's last, counted from the phase's begin."""
        end = (block + 1) * _BLOCK
        return end if self.end is None else min(end, self.end - self.begin)

    def counts(self, slots: int) -> list[int]:
        """Groups of each source in the phase's first slots; together they are as many as the slots."""
        bounds = [slots * share.numerator // share.denominator for share in self.shares]
        return [upper - lower for lower, upper in zip([0, *bounds], bounds, strict=False)]


def _phases(sources: Sequence[PlannedSource], slots_of_step: int) -> Iterator[_Phase]:
    """The phases, until no source is open. They are some for each source, however long training is."""
    slots = sorted({*(s.begin for s in sources), *(s.end for s in sources if s.end is not None)})
    of_epochs = sorted({*(s.begin_epoch for s in sources), *(s.end_epoch for s in sources if s.end_epoch is not None)})
    filled = [0] * len(sources)
    begin, epochs = 0, Fraction(0)
    while is_open := [i for i, source in enumerate(sources) if source.is_open(begin, epochs)]:
        weights = [sources[i].weight * sources[i].groups_of_epoch for i in is_open]
        epoch = sum((sources[i].groups_of_epoch for i in is_open), Fraction(0))
        steps = (math.ceil((begin + (bound - epochs) * epoch) / slots_of_step) for bound in of_epochs if bound > epochs)
        ends = [*(slot for slot in slots if slot > begin), *(step * slots_of_step for step in steps)]
        end = min(ends) if ends else None
        shares = [share / sum(weights) for share in accumulate(weights)]
        phase = _Phase(begin, end, is_open, [filled[i] for i in is_open], shares)
        yield phase
        if end is None:
            return
        for i, count in zip(is_open, phase.counts(end - begin), strict=True):
            filled[i] += count
        begin, epochs = end, epochs + (end - begin) / epoch


def _order(size: int, seed: int, name: str, epoch: int, shuffle: bool) -> Callable[[int], int]:
    return KeyedBijection(size, key(seed, "sample_order", name, epoch)) if shuffle else lambda place: place
