"""Context parallelism: self attention over a sequence whose tokens are spread over ranks.

Ulysses, ring, or both: Ulysses inside (it exchanges more often, so its ranks are neighbours), ring outside. A rank's
place is cp_rank = ring_rank * ulysses_size + ulysses_rank, and it holds the cp_rank-th chunk of the sequence. Cross
attention needs none of this: every rank has the whole text.
Shapes: B batch, c tokens of a rank (equal on all, padded at the end of the sequence), N heads, K head width.

Source of the combination: Fang and Zhao 2024 (USP, arXiv 2405.07719), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mm.ops.attention.api import ActivationPolicy, Attend, attention, keep_inputs, keep_nothing
from mm.ops.attention.packed import segment_attention
from mm.ops.attention.segments import Segments
from mm.parallel.groups import GroupMaker
from mm.parallel.ring import Ring, ring_attention
from mm.parallel.ulysses import gather_heads, scatter_heads
from mm.wan.layers import SelfAttention


@dataclass(frozen=True)
class ContextGroups:
    """One rank's context-parallel groups.

    Attributes:
        ulysses: the ranks among which heads are exchanged for tokens, consecutive; None for a degree of 1.
        ring: the ranks around which keys and values travel, `ulysses_size` apart; None for a degree of 1.
        ring_overlap: the ranks of `ring` on a second communicator, or None; see `mm.parallel.ring.Ring`.
        window_size: ring ranks in a window of the double ring; the size of the ring, or 1, means one ring.
        ring_outer: the ranks of `ring` on a communicator for the exchanges between windows, or None.
    """

    ulysses: dist.ProcessGroup | None
    ring: dist.ProcessGroup | None
    ring_overlap: dist.ProcessGroup | None
    window_size: int
    ring_outer: dist.ProcessGroup | None = None


def build_context_groups(
    cp_group: dist.ProcessGroup,
    all_cp_groups: Sequence[Sequence[int]],
    ulysses_size: int,
    window_size: int,
    send_recv_overlap: bool,
    maker: GroupMaker,
) -> ContextGroups:
    """Split the context-parallel groups of the world. Every process calls it, and all arguments but the first agree.

    Args:
        cp_group: this process's context-parallel group; used as it is where it need not be split.
        all_cp_groups: global ranks, ascending, of every context-parallel group of the world, all of one size.
        ulysses_size: degree of Ulysses; divides the size of the groups, and what is left is the degree of the ring.
        window_size: ring ranks in a window of the double ring, dividing the ring; 1 for one ring.
        send_recv_overlap: whether a ring sends and receives on separate communicators.
        maker: makes the new groups.

    Raises:
        ValueError: sizes that do not divide, groups of different sizes, or a process that is in none of them.
    """
    ring_size = _check_sizes(all_cp_groups, ulysses_size, window_size)
    ulysses_ranks = [ranks[i : i + ulysses_size] for ranks in all_cp_groups for i in range(0, len(ranks), ulysses_size)]
    ring_ranks = [ranks[i::ulysses_size] for ranks in all_cp_groups for i in range(ulysses_size)]
    ulysses = ring = overlap = outer = None
    if ulysses_size > 1:
        ulysses = cp_group if ring_size == 1 else maker.make("ulysses", ulysses_ranks)
    if ring_size > 1:
        ring = cp_group if ulysses_size == 1 else maker.make("ring", ring_ranks)
        overlap = maker.make("ring overlap", ring_ranks) if send_recv_overlap else None
        outer = maker.make("ring outer", ring_ranks) if 1 < window_size < ring_size else None
    if not any(dist.get_rank() in ranks for ranks in all_cp_groups):
        raise ValueError(f"process {dist.get_rank()} is in none of the context-parallel groups {all_cp_groups}")
    if overlap is not None:
        # A communicator is set up by its first use, which all of its ranks must take part in; choosing it by the
        # sender's parity leaves some of them out.
        for group in (ring, overlap):
            dist.barrier(group)
    return ContextGroups(ulysses, ring, overlap, window_size, outer)


def context_attention(groups: ContextGroups, attend: Attend = attention) -> SelfAttention:
    """The self attention of one context-parallel rank.

    Args:
        groups: of the rank. attend: attention to a whole sequence, which a ring has nowhere.

    Returns:
        attention(q, k, v, segments, keep) -> out, differentiable. q, k, v and out are [B, c, N, K], this rank's
        tokens, already rotated; B is 1 where there are several segments. These are the samples of the whole sequence,
        whose places at a ring's rank are the tokens of its Ulysses ranks together. A segment sees itself alone.
        Padding has no influence on the others; its output and gradients are zero. `keep` is asked for what attention
        reads ("q,k,v") and for its output before heads are exchanged back ("O"). All ranks of the groups call it
        together.
    """
    ulysses, ring = groups.ulysses, None
    if groups.ring is not None:
        ring = Ring(groups.ring, groups.ring_overlap, groups.ring_outer, groups.window_size)
    ulysses_size, ring_size = ulysses.size() if ulysses else 1, ring.size if ring else 1

    def attention_over_ranks(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, keep: ActivationPolicy = keep_nothing
    ) -> Tensor:
        _check_segments(segments, q.shape[1], ulysses_size, ring_size)
        if ulysses is not None:
            q, k, v = scatter_heads(q, k, v, ulysses, keep)
        else:
            q, k, v = keep_inputs(q, k, v, keep)
        if ring is not None:
            out = ring_attention(q, k, v, segments, ring, keep)
        else:
            out = _whole_sequence(q, k, v, segments, keep, attend)
        return out if ulysses is None else gather_heads(out, ulysses)

    return attention_over_ranks


def _check_segments(segments: Segments, places: int, ulysses_size: int, ring_size: int) -> None:
    """Every rank must have as many places as the segments say, or attention would read one sample as another."""
    if segments.places != places * ulysses_size:
        raise ValueError(f"segments of {segments.places} places on {ulysses_size} ranks with {places} places each")
    for num_tokens, own in segments.each:
        if not 1 <= num_tokens <= ring_size * own:
            raise ValueError(f"{num_tokens} tokens in {ring_size} chunks with {own} places each")


def _whole_sequence(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, keep: ActivationPolicy, attend: Attend
) -> Tensor:
    """Attention where every token is at hand, [B, T, N, K]; zeros at the padding."""
    if len(segments.each) > 1:
        return segment_attention(q, k, v, segments.padded_pairs(), keep)
    ((num_tokens, places),) = segments.each
    real, padding = slice(0, num_tokens), places - num_tokens
    out = attend(q[:, real], k[:, real], v[:, real], keep)
    return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out  # padding by nothing is a copy


def _check_sizes(all_cp_groups: Sequence[Sequence[int]], ulysses_size: int, window_size: int) -> int:
    """The degree of the ring."""
    cp_size = len(all_cp_groups[0])
    if any(len(ranks) != cp_size or list(ranks) != sorted(ranks) for ranks in all_cp_groups):
        raise ValueError(f"context-parallel groups must be of one size and ascending, got {all_cp_groups}")
    if cp_size % ulysses_size or cp_size // ulysses_size % window_size:
        raise ValueError(f"{cp_size} ranks do not split into Ulysses {ulysses_size} x windows of {window_size}")
    return cp_size // ulysses_size
