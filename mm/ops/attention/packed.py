"""Attention of several samples in one sequence: rows of queries, each with the rows of keys that they see.

No mask is made and no score between two samples is computed. Devices with a kernel for sequences of many lengths get
all pairs in one call of it; elsewhere each pair is a call of the dense attention.
Shapes: T tokens of the queries, S tokens of the keys, N heads, K head width; the batch is 1 where there are pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.ops.attention import npu, varlen
from mm.ops.attention.api import ActivationPolicy, attention_backward, attention_with_lse, keep_nothing
from mm.ops.attention.fused import LOW_PRECISION
from mm.ops.attention.segments import Pair, Pairs, consecutive, part, take_rows


def segment_attention(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, keep: ActivationPolicy = keep_nothing) -> Tensor:
    """Non-causal softmax attention of each pair; differentiable.

    Args:
        q: [1, T, N, K]. k, v: [1, S, N, K].
        pairs: which rows see which.
        keep: is asked for the output and its log-sum-exp under the name "O".

    Returns:
        [1, T, N, K] in the dtype of `q`, zeros in rows of no pair. Rows of no pair have no influence and get gradients
        of zero.
    """
    out: Tensor = _SegmentAttention.apply(q, k, v, pairs, keep)
    return out


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, keep: ActivationPolicy) -> Tensor:
        out, lse = keep("O", lambda: _forward(q, k, v, pairs))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pairs = pairs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for pair, (of_q, of_k, of_v) in backward_of_pairs(grad_out, q, k, v, out, lse, ctx.pairs):
            dq[:, pair.queries] = of_q
            dk[:, pair.keys] = of_k
            dv[:, pair.keys] = of_v
        return dq, dk, dv, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Output [1, T, N, K] and log-sum-exp [1, N, T], zeros in rows of no pair."""
    out, lse = torch.zeros_like(q), None
    for pair, of_pair, lse_of_pair in forward_of_pairs(q, k, v, pairs):
        if lse is None:
            lse = lse_of_pair.new_zeros(1, q.shape[2], q.shape[1])
        out[:, pair.queries] = of_pair
        lse[..., pair.queries] = lse_of_pair
    if lse is None:
        raise ValueError("attention needs a pair of queries and keys")
    return out, lse


def forward_of_pairs(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> Iterator[tuple[Pair, Tensor, Tensor]]:
    """Each pair with its output [1, t, N, K] and log-sum-exp [1, N, t].

    Args:
        q: [B, T, N, K]; k, v: [B, S, N, K]; B may be more than 1 where there is one pair.
        pairs: which rows see which.
    """
    if not _in_one_call(q, pairs):
        for pair in pairs.each:
            keys, values = (part(x, pair.keys) for x in (k, v))
            yield pair, *attention_with_lse(part(q, pair.queries), keys, values)
        return
    lengths = pairs.lengths(q.device)
    kernel = npu.varlen_attention_with_lse if q.device.type == "npu" else varlen.attention_with_lse
    of_queries, keys, values = _gathered(pairs, (q,), (k, v))
    out, lse = kernel(of_queries, keys, values, lengths)
    for pair, rows in zip(pairs.each, consecutive(lengths.query_counts), strict=True):
        yield pair, part(out.unsqueeze(0), rows), part(lse.unsqueeze(0), rows, dim=2)


def backward_of_pairs(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs
) -> Iterator[tuple[Pair, tuple[Tensor, Tensor, Tensor]]]:
    """Each pair with the gradients of its queries, keys and values; arguments as of `attention_backward`."""
    if not _in_one_call(q, pairs):
        for pair in pairs.each:
            of_grad, of_q, of_out = (part(x, pair.queries) for x in (grad_out, q, out))
            keys, values = (part(x, pair.keys) for x in (k, v))
            yield pair, attention_backward(of_grad, of_q, keys, values, of_out, part(lse, pair.queries, dim=2))
        return
    lengths = pairs.lengths(q.device)
    kernel = npu.varlen_attention_backward if q.device.type == "npu" else varlen.attention_backward
    grad_out, q, out, k, v = _gathered(pairs, (grad_out, q, out), (k, v))
    lse = torch.cat([part(lse, pair.queries, dim=2) for pair in pairs.each], dim=2).squeeze(0)
    dq, dk, dv = (grad.unsqueeze(0) for grad in kernel(grad_out, q, k, v, out, lse, lengths))
    rows_of_pairs = zip(pairs.each, consecutive(lengths.query_counts), consecutive(lengths.key_counts), strict=True)
    for pair, rows, keys_at in rows_of_pairs:
        yield pair, (part(dq, rows), part(dk, keys_at), part(dv, keys_at))


def _in_one_call(q: Tensor, pairs: Pairs) -> bool:
    """Tell whether there is a kernel for sequences of many lengths, and more than one of them."""
    if len(pairs.each) < 2 or q.dtype not in LOW_PRECISION:
        return False
    return q.device.type == "npu" or (q.device.type == "cuda" and q.shape[-1] <= varlen.WIDEST_HEAD)


def _gathered(pairs: Pairs, of_queries: tuple[Tensor, ...], of_keys: tuple[Tensor, ...]) -> list[Tensor]:
    """Rows of the pairs one after the other, [T', N, K] each."""
    queries, keys = ([pair[side] for pair in pairs.each] for side in (0, 1))
    rows = [take_rows(x, queries) for x in of_queries] + [take_rows(x, keys) for x in of_keys]
    return [x.squeeze(0) for x in rows]
