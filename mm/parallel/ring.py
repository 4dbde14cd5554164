"""Ring attention: keys and values travel from rank to rank while every rank keeps its queries.

Every sample of a sequence is cut into one contiguous chunk a rank. Every rank sees every chunk once: it attends to the
one at hand while the next is on its way, and merges the results by their log-sum-exp. The backward sends the chunks
around again, each followed by the sum of its gradients. Shapes: B batch, P ranks of the ring, c tokens of a chunk
(equal on all ranks, padded at the end of each sample), N heads, K head width.

With a window of w ranks the ring is doubled: chunks go around inside a window of w consecutive ranks, and then all of
them move on to the next window, an exchange that has the whole round inside the window to complete. One window of P
ranks, or P windows of one, is the plain ring.

Sources: Liu et al. 2023 (Ring Attention, arXiv 2310.01889); Gu et al. 2024 (LoongTrain, arXiv 2406.18485), section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mm.ops.attention import api as attention
from mm.ops.attention import packed
from mm.ops.attention.api import ActivationPolicy, keep_nothing
from mm.ops.attention.segments import Pairs, Segments, put_rows, take_rows


@dataclass(frozen=True)
class Ring:
    """One rank's place in the ring, and its links.

    A visit is one chunk at hand at one rank; every rank has the visits 0 to P-1 at the same time, of different chunks,
    and visit P is the chunk's return to where it started.

    Attributes:
        group: the ranks of the ring, in the order of their chunks.
        overlap_group: the same ranks on a second communicator, or None. With it a message uses the group chosen by
            the parity of its sender, so that what a rank sends and what it receives do not queue behind each other.
        outer_group: the same ranks on a communicator for the exchanges between windows, or None. With it they do not
            delay the exchanges inside a window, which are posted later and needed sooner.
        window_size: ranks in a window; divides P.
    """

    group: dist.ProcessGroup
    overlap_group: dist.ProcessGroup | None
    outer_group: dist.ProcessGroup | None
    window_size: int

    @property
    def size(self) -> int:
        """Ranks in the ring, P."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's place in the ring, which is the number of its own chunk."""
        return self.group.rank()

    def chunk(self, visit: int) -> int:
        """The chunk that this rank has at hand at a visit."""
        return self._shifted(self.rank, -(visit // self.window_size), -(visit % self.window_size))

    def holder(self, chunk: int, visit: int) -> int:
        """The rank that has a chunk at hand at a visit."""
        return self._shifted(chunk, visit // self.window_size, visit % self.window_size)

    def _shifted(self, rank: int, windows: int, places: int) -> int:
        """The rank that many windows further, and that many places further inside its window, both around the ring."""
        w = self.window_size
        return (rank // w + windows) % (self.size // w) * w + (rank % w + places) % w

    def post(self, tensor: Tensor, visit: int, next_visit: int, outer: bool = False) -> Exchange:
        """Start to send what belongs to the chunk at hand to where it is at a later visit, and to receive the same.

        Args:
            tensor: contiguous, not written to before the exchange has completed.
            visit: the visit at which this rank has the chunk.
            next_visit: the visit at which the receiver has it.
            outer: whether this is an exchange between windows.
        """
        send_to = self.holder(self.chunk(visit), next_visit)
        receive_from = self.holder(self.chunk(next_visit), visit)
        received = torch.empty_like(tensor)
        messages = [
            dist.P2POp(dist.isend, tensor, group=self._link(self.rank, outer), group_peer=send_to),
            dist.P2POp(dist.irecv, received, group=self._link(receive_from, outer), group_peer=receive_from),
        ]
        if messages[0].group is messages[1].group:
            works = dist.batch_isend_irecv(messages)
        else:  # a batch goes through one communicator
            works = [work for message in messages for work in dist.batch_isend_irecv([message])]
        return Exchange(tensor, received, works)

    def _link(self, sender: int, outer: bool) -> dist.ProcessGroup:
        if outer and self.outer_group is not None:
            return self.outer_group
        return self.overlap_group if self.overlap_group is not None and sender % 2 else self.group


@dataclass(frozen=True)
class Exchange:
    """A message under way in each direction; holds on to both buffers."""

    sent: Tensor
    received: Tensor
    works: list[dist.Work]

    def wait(self) -> Tensor:
        """Received tensor. On an accelerator its stream waits, the process does not."""
        for work in self.works:
            work.wait()
        return self.received


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, ring: Ring, keep: ActivationPolicy = keep_nothing
) -> Tensor:
    """Non-causal softmax attention over a sequence that is spread over the ring; differentiable.

    Args:
        q, k, v: [B, c, N, K], this rank's chunk of each segment one after the other; what lies behind a segment's
            tokens is padding, whose content has no influence. B is 1 where there are several segments.
        segments: of the whole sequence, with 1 to P times their places of tokens. Each sees itself alone.
        ring: this rank's place and links.
        keep: is asked for the output and its log-sum-exp under the name "O".

    Returns:
        [B, c, N, K] in the dtype of `q`; zeros at the padding, and gradients of zero there.
    """
    out: Tensor = _RingAttention.apply(q, k, v, _Sequence(segments, ring), keep)
    return out


class _Sequence(NamedTuple):
    """A sequence that is spread over a ring: its samples, and this rank's place."""

    segments: Segments
    ring: Ring

    def own_rows(self) -> list[slice]:
        """The places of this rank's chunk that have tokens, of each sample."""
        return self.segments.rows(self.ring.rank)

    def pairs(self, visit: int) -> Pairs:
        """This rank's tokens, counted without padding, with the places of the chunk at hand that they see."""
        return self.segments.pairs(self.ring.rank, self.ring.chunk(visit))


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, whole: _Sequence, keep: ActivationPolicy) -> Tensor:
        out, lse = keep("O", lambda: _around_the_ring(q, k, v, whole))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.whole = whole
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        whole, ring, real = ctx.whole, ctx.whole.ring, ctx.whole.own_rows()
        saved = [take_rows(x, real) for x in (grad_out, q, out)]
        dq = torch.zeros_like(saved[1], dtype=lse.dtype)
        own = torch.zeros((2, *k.shape), dtype=lse.dtype, device=k.device)  # dk and dv of this rank's chunk
        arriving: Exchange | None = None
        for visit, kv in _visits(torch.stack((k, v)), ring):
            grad_of_rows, rows, out_of_rows = saved
            pairs = whole.pairs(visit)
            grads = list(packed.backward_of_pairs(grad_of_rows, rows, kv[0], kv[1], out_of_rows, lse, pairs))
            # Only now: the sum over the chunk's earlier ranks arrives while this rank's share is computed.
            dkv = own if visit == 0 else torch.zeros_like(own) if arriving is None else arriving.wait()
            for pair, (of_q, of_k, of_v) in grads:
                dq[:, pair.queries] += of_q
                dkv[0, :, pair.keys] += of_k
                dkv[1, :, pair.keys] += of_v
            if visit > 0:  # this rank's share of its own chunk stays here, which saves a hop
                arriving = ring.post(dkv, visit, visit + 1)
        if arriving is not None:
            own += arriving.wait()
        return put_rows(dq, q, real), own[0].to(k.dtype), own[1].to(v.dtype), None, None


def _around_the_ring(q: Tensor, k: Tensor, v: Tensor, whole: _Sequence) -> tuple[Tensor, Tensor]:
    """Output [B, c, N, K], zeros at the padding, and log-sum-exp [B, N, real tokens]."""
    real = whole.own_rows()
    rows = take_rows(q, real)
    out, lse = _nothing_attended(rows)
    for visit, kv in _visits(torch.stack((k, v)), whole.ring):
        for pair, *block in packed.forward_of_pairs(rows, kv[0], kv[1], whole.pairs(visit)):
            mine = pair.queries
            # the output is merged in its place
            _, lse[..., mine] = merge_attention(out[:, mine], lse[..., mine], *block)
    return put_rows(out, q, real), lse


def _visits(kv: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Every visit of this rank and the chunk at hand, kv [2, B, c, N, K]; the next exchange is posted before each."""
    for first in range(0, ring.size, ring.window_size):
        next_window = first + ring.window_size
        outer = ring.post(kv, first, next_window, outer=True) if next_window < ring.size else None
        current = kv
        for visit in range(first, next_window):
            inner = ring.post(current, visit, visit + 1) if visit + 1 < next_window else None
            yield visit, current
            if inner is not None:
                current = inner.wait()
        if outer is not None:
            kv = outer.wait()


def _nothing_attended(q: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over no keys at all, in the accumulation dtype: what `merge_attention` starts from."""
    batch, num_queries, heads, _ = q.shape
    dtype = attention.accumulation_dtype(q.dtype)
    return torch.zeros_like(q, dtype=dtype), q.new_full((batch, heads, num_queries), float("-inf"), dtype=dtype)


def merge_attention(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each.

    Args:
        out: [B, T, N, K] in the accumulation dtype; overwritten with the result.
        lse: [B, N, T], log-sum-exp that belongs to `out`.
        block_out, block_lse: the same of the other keys; block_out in any dtype.

    Source: Dao 2023 (FlashAttention-2), section 2.3, with exp(b) / (exp(a) + exp(b)) written as sigmoid(b - a).
    """
    weight = torch.sigmoid(block_lse - lse).transpose(1, 2)[..., None]
    return out.lerp_(block_out.to(out.dtype), weight), torch.logaddexp(lse, block_lse)
