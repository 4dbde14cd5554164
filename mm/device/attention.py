"""Attention over one block of keys that also returns the log-sum-exp, and its backward: what ring attention is made of.

With the log-sum-exp at hand, the attention to a long sequence can be put together from the attention to its blocks,
and each block's gradient needs only the output and log-sum-exp of the whole. The plain pair below runs everywhere and
is the reference; torch has fused kernels for it on CPU and CUDA, and torch_npu on NPUs. Shapes: B batch, T tokens of
the queries, S tokens of the keys, N heads, K head width.

Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691), section 3.1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.device import npu

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_MAX_WIDTH = 256
_FLASH_WIDTH_MULTIPLE = 8


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over many blocks are kept: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Non-causal softmax attention without a mask, and how much weight the keys had in all.

    Args:
        q: [B, T, N, K], T >= 1.
        k, v: [B, S, N, K], S >= 1.

    Returns:
        out: [B, T, N, K] in the dtype of `q`, softmax(q k^T / sqrt(K)) v.
        lse: [B, N, T], natural logarithm of the sum over keys of exp(q k^T / sqrt(K)); fp32, or fp64 for fp64.

    Raises:
        ValueError: without a query or a key.
    """
    _check_not_empty(q, k)
    path = _path(q)
    if path == "plain":
        return plain_attention_with_lse(q, k, v)
    if path == "npu":
        return npu.attention_with_lse(q, k, v)
    q, k, v = (_heads_first(x) for x in (q, k, v))
    out, lse = _cpu_forward(q, k, v) if path == "cpu" else _cuda_forward(q, k, v)
    return out.transpose(1, 2), lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the attention to the block of keys `k`.

    `out` and `lse` may be those of more keys than this block has: then dk and dv are the block's true gradients, and
    the dq of all blocks add up to the gradient of the queries.

    Args:
        grad_out: [B, T, N, K], gradient of the output to all keys.
        q: [B, T, N, K]; k, v: [B, S, N, K].
        out: [B, T, N, K], attention to all keys, in the dtype of `q`.
        lse: [B, N, T], log-sum-exp over all keys, as `attention_with_lse` returns it.

    Returns:
        dq [B, T, N, K], dk and dv [B, S, N, K] in the dtypes of q, k and v.

    Raises:
        ValueError: without a query or a key.
    """
    _check_not_empty(q, k)
    path = _path(q)
    if path == "plain":
        return plain_attention_backward(grad_out, q, k, v, out, lse)
    if path == "npu":
        return npu.attention_backward(grad_out, q, k, v, out, lse)
    grad_out, q, k, v, out = (_heads_first(x) for x in (grad_out, q, k, v, out))
    backward = _cpu_backward if path == "cpu" else _cuda_backward
    dq, dk, dv = (grad.transpose(1, 2) for grad in backward(grad_out, q, k, v, out, lse))
    return dq, dk, dv


def plain_attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in a few matrix products; holds all T x S scores."""
    scores = _scores(q, k)
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp()
    out = torch.einsum("bnts,bsnk->btnk", weights, v.to(weights.dtype))
    return out.to(q.dtype), lse


def plain_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_backward` in a few matrix products; holds all T x S scores."""
    weights = (_scores(q, k) - lse[..., None]).exp()  # softmax over all keys, seen at this block's
    grad_out, out = grad_out.to(weights.dtype), out.to(weights.dtype)
    dv = torch.einsum("bnts,btnk->bsnk", weights, grad_out)
    grad_weights = torch.einsum("btnk,bsnk->bnts", grad_out, v.to(weights.dtype))
    mean_grad = (grad_out * out).sum(dim=-1).transpose(1, 2)  # sum of weights * grad_weights over all keys
    grad_scores = weights * (grad_weights - mean_grad[..., None]) * q.shape[-1] ** -0.5
    dq = torch.einsum("bnts,bsnk->btnk", grad_scores, k.to(weights.dtype))
    dk = torch.einsum("bnts,btnk->bsnk", grad_scores, q.to(weights.dtype))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[B, N, T, S] scaled scores in the accumulation dtype."""
    dtype = accumulation_dtype(q.dtype)
    return torch.einsum("btnk,bsnk->bnts", q.to(dtype), k.to(dtype)) * q.shape[-1] ** -0.5


def _path(q: Tensor) -> Literal["cpu", "cuda", "npu", "plain"]:
    """Which implementation takes such a tensor."""
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "cuda" and q.dtype in _FLASH_DTYPES and q.shape[-1] <= _FLASH_MAX_WIDTH:
        return "cuda"
    if q.device.type == "npu" and q.dtype in _FLASH_DTYPES:
        return "npu"
    return "plain"


def _check_not_empty(q: Tensor, k: Tensor) -> None:
    # The fused CPU kernel divides by these lengths and takes the whole process down.
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError(f"attention needs a query and a key, got {q.shape[1]} queries and {k.shape[1]} keys")


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, N, K] as [B, N, T, K], with neighbouring elements of a head next to each other in memory."""
    # The fused kernels assume that stride without looking, and return wrong numbers otherwise.
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


# Below: heads first, [B, N, T, K]; lse is [B, N, T].


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False
    )
    return dq, dk, dv


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k, v = (_pad_width(x) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=width**-0.5)
    return out.narrow(-1, 0, width), lse


def _cuda_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    width = q.shape[-1]
    grad_out, q, k, v, out = (_pad_width(x) for x in (grad_out, q, k, v, out))
    no_dropout = torch.empty((), dtype=torch.int64, device=q.device)  # the random state, which nothing reads
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, False,
        no_dropout, no_dropout, scale=width**-0.5,
    )  # fmt: skip
    return dq.narrow(-1, 0, width), dk.narrow(-1, 0, width), dv.narrow(-1, 0, width)


def _pad_width(x: Tensor) -> Tensor:
    """Zeros behind every head up to the multiple the kernel takes; they change no score and no output."""
    missing = -x.shape[-1] % _FLASH_WIDTH_MULTIPLE
    return F.pad(x, (0, missing)) if missing else x
