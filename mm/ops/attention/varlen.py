"""Flash attention of many sequences that lie one after the other, on CUDA: torch's operator without its autograd.

Shapes: T tokens of all queries, S of all keys, N heads, K head width.
Source: torch/nn/attention/varlen.py of torch 2.13, which calls the same operators; it does not take the log-sum-exp of
more keys than a call has, which ring attention asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.ops.attention.fused import pad_width
from mm.ops.attention.segments import Lengths

WIDEST_HEAD = 256
"""Of the flash kernel."""


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> tuple[Tensor, Tensor]:
    """Attention of each sequence of queries to its keys.

    Args:
        q: [T, N, K]; k, v: [S, N, K], fp16 or bf16.
        lengths: of the sequences.

    Returns:
        out [T, N, K] in the dtype of `q`, lse [N, T] fp32.
    """
    width = q.shape[-1]
    q, k, v = (pad_width(_dense(x)) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_where(lengths), 0.0, False, False, scale=width**-0.5
    )
    return out.narrow(-1, 0, width), lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from the output and log-sum-exp over these or more keys.

    Args:
        grad_out, q, out: [T, N, K]; k, v: [S, N, K]; lse: [N, T] fp32.
        lengths: of the sequences.
    """
    width = q.shape[-1]
    grad_out, q, k, v, out = (pad_width(_dense(x)) for x in (grad_out, q, k, v, out))
    random_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # which nothing reads without dropout
    unused = torch.empty(0, device=q.device)
    tensors = grad_out, q, k, v, out, lse.contiguous()
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *tensors, *_where(lengths), 0.0, False, random_state, unused, scale=width**-0.5
    )
    return dq.narrow(-1, 0, width), dk.narrow(-1, 0, width), dv.narrow(-1, 0, width)


def _where(lengths: Lengths) -> tuple[Tensor, Tensor, int, int]:
    return lengths.query_starts, lengths.key_starts, lengths.longest_queries, lengths.longest_keys


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
