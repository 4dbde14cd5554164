"""Division of samples' tokens over ranks.

The tokens of a sample, in row-major order of their grid, are cut into equal contiguous chunks, one for each rank of the
ring. What the ring's rank has of all samples of a sequence lies one after the other, and is cut again into equal
contiguous parts: over the Ulysses ranks and, with sequence parallelism, over the tensor-parallel ranks. So every step
of a ring works on matching chunks of each sample, and the other exchanges put a whole sequence together. With one
sample the ranks' shares are its tokens cut into as many equal chunks as there are ranks.

A count that does not divide is padded, at the end of each sample; padded tokens never take part in attention between
video tokens and are left out of the loss, so that nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import Tensor

from mm.ops.attention.segments import Segment, Segments
from mm.wan.packed import Run, joined
from mm.wan.patches import window


@dataclass(frozen=True)
class TokenShare:
    """One rank's share of the tokens.

    Attributes:
        cp_rank, cp_size: along the context-parallel axis.
        sp_rank, sp_size: along the tensor-parallel axis with sequence parallelism; 0 and 1 without.
        ulysses_size: of the context-parallel ranks, those that exchange heads; consecutive.
    """

    cp_rank: int = 0
    cp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1
    ulysses_size: int = 1

    def width(self, num_tokens: int) -> int:
        """Tokens, padding included, that each rank holds of a sample of `num_tokens` alone in its sequence."""
        return -(-num_tokens // (self.cp_size * self.sp_size))

    def places(self, lengths: Sequence[int]) -> int:
        """Tokens, padding included, that each rank holds of samples with so many in one sequence."""
        return sum(self.width(length) for length in lengths)

    def segments(self, lengths: Sequence[int]) -> Segments:
        """The samples of a sequence, as attention meets them: in a chunk for each rank of the ring."""
        ranks = self.sp_size * self.ulysses_size
        return Segments(tuple(Segment(length, self.width(length) * ranks) for length in lengths))

    def runs(self, lengths: Sequence[int]) -> list[Run]:
        """This rank's places, in order."""
        count = self.places(lengths)
        return self._runs(lengths, (self.cp_rank * self.sp_size + self.sp_rank) * count, count)

    def chunk_runs(self, lengths: Sequence[int]) -> list[Run]:
        """The places of all sequence-parallel ranks of this context-parallel rank: what attention sees."""
        count = self.places(lengths) * self.sp_size
        return self._runs(lengths, self.cp_rank * count, count)

    def take(self, samples: Sequence[Tensor], dim: int) -> Tensor:
        """This rank's tokens of samples, whose whole tokens lie along `dim`; padded with zeros."""
        return _take(samples, self.runs([x.shape[dim] for x in samples]), dim)

    def take_chunk(self, samples: Sequence[Tensor], dim: int) -> Tensor:
        """The tokens of `chunk_runs`, as `take` gives those of `runs`."""
        return _take(samples, self.chunk_runs([x.shape[dim] for x in samples]), dim)

    def joined(self, of_ranks: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The whole tokens [B, T, ...] of each sample, out of the places [B, t, ...] of every rank in order."""
        wholes = [of_ranks[0].new_empty(len(of_ranks[0]), length, *of_ranks[0].shape[2:]) for length in lengths]
        for rank, places in enumerate(of_ranks):
            cp_rank, sp_rank = divmod(rank, self.sp_size)
            start = 0
            for run in replace(self, cp_rank=cp_rank, sp_rank=sp_rank).runs(lengths):
                wholes[run.sample][:, run.start : run.start + run.real] = places[:, start : start + run.real]
                start += run.places
        return wholes

    def _runs(self, lengths: Sequence[int], first: int, count: int) -> list[Run]:
        """Runs of `count` places from `first` on, counted through the ring's ranks."""
        segments, runs = self.segments(lengths), []
        ring_rank, first = divmod(first, segments.places)
        begin = 0  # of the sample in the ring rank's places
        for index, (num_tokens, places) in enumerate(segments.each):
            start, stop = max(first, begin), min(first + count, begin + places)
            if start < stop:
                runs.append(Run(index, ring_rank * places + start - begin, stop - start, num_tokens))
            begin += places
        return runs


def counts_of(runs: Sequence[Run], parts: Sequence[Sequence[int]]) -> list[int]:
    """Places of each part of each sample.

    Args:
        runs: the places.
        parts: of each sample, numbers of tokens of its parts, which are all of it. Padding belongs to the last part.
    """
    firsts = [[*accumulate(counts[:-1], initial=0)] for counts in parts]
    counts = [0] * sum(map(len, parts))
    for run in runs:
        index = sum(map(len, parts[: run.sample]))
        stops = [*firsts[run.sample][1:], run.start + run.places]
        for first, stop in zip(firsts[run.sample], stops, strict=True):
            counts[index] += max(min(stop, run.start + run.places) - max(first, run.start), 0)
            index += 1
    return counts


def _take(samples: Sequence[Tensor], runs: Sequence[Run], dim: int) -> Tensor:
    return joined([window(samples[run.sample], dim, run.start, run.places) for run in runs], dim)
