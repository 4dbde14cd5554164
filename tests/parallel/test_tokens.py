"""Shares of samples in one sequence: every token on one rank, matching chunks for a ring, order for the others."""

from itertools import product

import pytest
import torch

from mm.parallel.tokens import TokenShare

LENGTHS = [45, 2, 7, 12, 1]
DEGREES = [(ring, ulysses, sp) for ring, ulysses, sp in product((1, 2, 3), (1, 2), (1, 2))]


def shares(ring: int, ulysses: int, sp: int) -> list[TokenShare]:
    """The ranks, sequence-parallel ones innermost."""
    cp = ring * ulysses
    return [TokenShare(c, cp, s, sp, ulysses) for c in range(cp) for s in range(sp)]


@pytest.mark.parametrize(("ring", "ulysses", "sp"), DEGREES)
def test_every_token_is_on_one_rank_and_ranks_have_as_many_places(ring: int, ulysses: int, sp: int) -> None:
    ranks = shares(ring, ulysses, sp)
    seen = [
        (run.sample, run.start + index) for rank in ranks for run in rank.runs(LENGTHS) for index in range(run.real)
    ]
    assert sorted(seen) == [(sample, token) for sample, length in enumerate(LENGTHS) for token in range(length)]
    assert {sum(run.places for run in rank.runs(LENGTHS)) for rank in ranks} == {ranks[0].places(LENGTHS)}


@pytest.mark.parametrize(("ring", "ulysses", "sp"), DEGREES)
def test_what_a_ring_rank_gathers_are_its_chunks_of_the_samples_in_order(ring: int, ulysses: int, sp: int) -> None:
    """Ulysses and sequence parallelism put their ranks' parts one after the other; attention expects `segments`."""
    samples = [1000 * i + torch.arange(length) + 1 for i, length in enumerate(LENGTHS)]
    ranks = shares(ring, ulysses, sp)
    segments = ranks[0].segments(LENGTHS)
    for chunk in range(ring):
        together = torch.cat([rank.take(samples, 0) for rank in ranks[chunk * ulysses * sp :][: ulysses * sp]])
        assert len(together) == segments.places
        for sample, segment, rows in zip(samples, segments.each, segments.rows(chunk), strict=True):
            expected = sample[chunk * segment.places :][: segment.places]
            assert torch.equal(together[rows], expected)
        assert int((together == 0).sum()) == segments.places - sum(s.real(chunk) for s in segments.each)
        of_attention = torch.cat([r.take_chunk(samples, 0) for r in ranks[chunk * ulysses * sp :: sp][:ulysses]])
        assert torch.equal(of_attention, together)


@pytest.mark.parametrize(("ring", "ulysses", "sp"), DEGREES)
def test_one_sample_is_cut_into_equal_chunks(ring: int, ulysses: int, sp: int) -> None:
    whole, size = torch.arange(45) + 1, ring * ulysses * sp
    padded = torch.cat((whole, torch.zeros(-45 % size, dtype=whole.dtype)))
    for rank, expected in zip(shares(ring, ulysses, sp), padded.chunk(size), strict=True):
        assert torch.equal(rank.take([whole], 0), expected)
