"""Several samples in one sequence: where each lies, and which rows of queries see which rows of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mm.device.copies import to_device


class Segment(NamedTuple):
    """One sample in a sequence that may have more.

    Attributes:
        num_tokens: of the sample. places: that it has in the chunk of each rank of a ring; all of its tokens, and
            padding behind them, in the chunks' order. Without a ring there is one chunk.
    """

    num_tokens: int
    places: int

    def real(self, chunk: int = 0) -> int:
        """Number of its tokens in a chunk; they come first."""
        return min(max(self.num_tokens - chunk * self.places, 0), self.places)


class Pair(NamedTuple):
    """Rows of queries, and the rows of keys that they see; neither is empty."""

    queries: slice
    keys: slice


@dataclass(frozen=True)
class Pairs:
    """Pairs that share no row of queries and none of keys.

    Attributes:
        each: the pairs, in the order of their queries.
    """

    each: tuple[Pair, ...]
    _on_device: dict[torch.device, Lengths] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def of_rows(cls, queries: Sequence[slice], keys: Sequence[slice]) -> Pairs:
        """Pairs of the n-th rows of queries with the n-th of keys, where both have some."""
        both = zip(queries, keys, strict=True)
        return cls(tuple(Pair(q, k) for q, k in both if q.start < q.stop and k.start < k.stop))

    def lengths(self, device: torch.device) -> Lengths:
        """Lengths for a kernel; made once for a device, as all blocks of a forward ask for the same."""
        if device not in self._on_device:
            queries, keys = ([_count(pair[side]) for pair in self.each] for side in (0, 1))
            self._on_device[device] = Lengths(
                tuple(queries),
                tuple(keys),
                to_device(torch.tensor([0, *accumulate(queries)], dtype=torch.int32), device),
                to_device(torch.tensor([0, *accumulate(keys)], dtype=torch.int32), device),
                max(queries),
                max(keys),
            )
        return self._on_device[device]


class Lengths(NamedTuple):
    """Lengths of many sequences that lie one after the other.

    Attributes:
        query_counts, key_counts: of each. query_starts, key_starts: where each starts, and the end of the last,
            int32 on the device. longest_queries, longest_keys: the largest length.
    """

    query_counts: tuple[int, ...]
    key_counts: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True)
class Segments:
    """The samples of a sequence, one after the other in each chunk of it.

    Attributes:
        each: the samples.
    """

    each: tuple[Segment, ...]
    _pairs: dict[tuple[int, int] | None, Pairs] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def whole(cls, lengths: Sequence[int]) -> Segments:
        """Samples with so many tokens, in one chunk without padding."""
        return cls(tuple(Segment(length, length) for length in lengths))

    @property
    def places(self) -> int:
        """Places of a chunk."""
        return sum(segment.places for segment in self.each)

    def rows(self, chunk: int = 0) -> list[slice]:
        """The places of a chunk that each sample's tokens take; padding is left out, and a slice may be empty."""
        starts = accumulate((segment.places for segment in self.each), initial=0)
        return [slice(start, start + segment.real(chunk)) for start, segment in zip(starts, self.each, strict=False)]

    def pairs(self, query_chunk: int = 0, key_chunk: int = 0) -> Pairs:
        """The tokens of a chunk, counted without padding, with the places of a chunk that they see.

        Made once, as all blocks of a forward ask for the same.
        """
        if (query_chunk, key_chunk) not in self._pairs:
            queries = consecutive([_count(rows) for rows in self.rows(query_chunk)])
            self._pairs[query_chunk, key_chunk] = Pairs.of_rows(queries, self.rows(key_chunk))
        return self._pairs[query_chunk, key_chunk]

    def padded_pairs(self) -> Pairs:
        """The tokens of the only chunk with themselves, in their places."""
        if None not in self._pairs:
            self._pairs[None] = Pairs.of_rows(self.rows(), self.rows())
        return self._pairs[None]


def consecutive(counts: Sequence[int]) -> list[slice]:
    """Rows that lie one after the other."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def part(x: Tensor, rows: slice, dim: int = 1) -> Tensor:
    """A view of consecutive rows. (Indexing would ask for the device of a fake tensor, which may not be here.)"""
    return x.narrow(dim, rows.start, _count(rows))


def take_rows(x: Tensor, rows: Sequence[slice]) -> Tensor:
    """The rows of [B, T, ...] one after the other; a view where they lie so."""
    if all(a.stop == b.start for a, b in pairwise(rows)):
        return part(x, slice(rows[0].start, rows[-1].stop))
    return torch.cat([part(x, own) for own in rows], dim=1)


def put_rows(x: Tensor, like: Tensor, rows: Sequence[slice]) -> Tensor:
    """The rows that `take_rows` took, back in their places with zeros between, in the shape and dtype of `like`."""
    if x.shape == like.shape:
        return x.to(like.dtype)
    padded = torch.zeros_like(like)
    for own, values in zip(rows, x.split([_count(own) for own in rows], dim=1), strict=True):
        part(padded, own).copy_(values)
    return padded


def _count(rows: slice) -> int:
    return int(rows.stop - rows.start)
