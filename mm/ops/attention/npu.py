"""Ascend NPUs: torch_npu's fused attention behind the interface of `mm.ops.attention.api`.

Called as functions without autograd, because the callers (`mm.parallel.ring`) differentiate by hand. Names, arguments
and shapes are held against the published wheel by tests/ops/test_npu_calls.py; docs/npu.md says what was never run.
Shapes: B batch, T tokens of the queries, S of the keys, N heads, K head width.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mm.ops.attention.segments import Lengths

_LAYOUT = "BSND"  # the operator's name for [B, T, N, K]
_MANY_LAYOUT = "TND"  # and for [T, N, K], many sequences one after the other
_LANES = 8  # the operator wants a row's maximum and sum eight times, side by side


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`mm.ops.attention.api.attention_with_lse` for fp16 and bf16.

    Args:
        q: [B, T, N, K]; k, v: [B, S, N, K].

    Returns:
        out [B, T, N, K], and lse [B, N, T] in fp32.

    Without a mask the operator attends to every key, whatever its sparse mode and token limits are.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention(
        q, k, v, q.shape[2], _LAYOUT, scale=q.shape[-1] ** -0.5
    )
    return out, maximum[..., 0] + total[..., 0].log()


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`mm.ops.attention.api.attention_backward` for fp16 and bf16; arguments and results as there.

    The operator takes a row's maximum m and sum s, and uses them only in weights = exp(score - m) / s. With m = lse and
    s = 1 the weights are the same, so 4 bytes a head and token are kept from the forward instead of 64, and the lse of
    more keys gives the weights under more keys, which is what ring attention asks of a block.
    """
    grad_out, q, k, v, out = (x.contiguous() for x in (grad_out, q, k, v, out))
    maximum = lse.unsqueeze(-1).repeat(1, 1, 1, _LANES)
    kept = {"softmax_max": maximum, "softmax_sum": torch.ones_like(maximum), "attention_in": out}
    dq, dk, dv, *_ = torch.ops.npu.npu_fusion_attention_grad(
        q, k, v, grad_out, q.shape[2], _LAYOUT, **kept, scale_value=q.shape[-1] ** -0.5
    )
    return dq, dk, dv


def varlen_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Attention of each of many sequences that lie one after the other, fp16 or bf16.

    Args:
        q: [T, N, K]; k, v: [S, N, K].
        lengths: of the sequences.

    Returns:
        out [T, N, K], and lse [N, T] in fp32.
    """
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, maximum, total, *_ = torch.ops.npu.npu_fusion_attention(
        q, k, v, q.shape[1], _MANY_LAYOUT, scale=q.shape[-1] ** -0.5, **_where(lengths)
    )
    return out, (maximum[..., 0] + total[..., 0].log()).t()


def varlen_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the log-sum-exp [N, T] stands for maximum and sum, as in `attention_backward`."""
    grad_out, q, k, v, out = (x.contiguous() for x in (grad_out, q, k, v, out))
    maximum = lse.t().unsqueeze(-1).repeat(1, 1, _LANES)
    kept = {"softmax_max": maximum, "softmax_sum": torch.ones_like(maximum), "attention_in": out}
    dq, dk, dv, *_ = torch.ops.npu.npu_fusion_attention_grad(
        q, k, v, grad_out, q.shape[1], _MANY_LAYOUT, **kept, scale_value=q.shape[-1] ** -0.5, **_where(lengths)
    )
    return dq, dk, dv


def _where(lengths: Lengths) -> dict[str, Any]:
    counts = {"actual_seq_qlen": lengths.query_counts, "actual_seq_kvlen": lengths.key_counts}
    ends = {name: list(accumulate(side)) for name, side in counts.items()}
    return {**ends, "softmax_layout": _MANY_LAYOUT}  # without it a token's heads would not lie side by side
