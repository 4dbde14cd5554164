"""Attention, and its two halves for one block of keys: forward with log-sum-exp, backward from it.

With the log-sum-exp at hand, the attention to a long sequence can be put together from the attention to its blocks,
and each block's gradient needs only the output and log-sum-exp of the whole. The plain pair below runs everywhere and
is the reference; torch has fused kernels for it on CPU and CUDA, and torch_npu on NPUs. Shapes: B batch, T tokens of
the queries, S tokens of the keys, N heads, K head width.

Source: Dao 2023 (FlashAttention-2, arXiv 2307.08691), section 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.ops.attention import npu
from mm.ops.attention.fused import LOW_PRECISION, Kernel, kernel_of

ActivationPolicy = Callable[[str, Callable[[], tuple[Tensor, ...]]], tuple[Tensor, ...]]
"""(name, compute) -> what `compute` gives; a recomputed block gets what it kept under the name, without computing."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over many blocks are kept: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keep_nothing(name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The `ActivationPolicy` of a block that is not recomputed, or recomputed whole."""
    del name
    return compute()


def attention(q: Tensor, k: Tensor, v: Tensor, keep: ActivationPolicy = keep_nothing) -> Tensor:
    """Non-causal softmax attention without a mask; differentiable.

    Args:
        q: [B, T, N, K], T >= 1. k, v: [B, S, N, K], S >= 1.
        keep: is asked for the output and its log-sum-exp under the name "O".

    Returns:
        [B, T, N, K] in the dtype of `q`. Kept for backward: q, k, v, the output and 4 bytes a token and head.
    """
    out: Tensor = _Attention.apply(q, k, v, keep)
    return out


Attend = Callable[[Tensor, Tensor, Tensor, ActivationPolicy], Tensor]
"""`attention`, or what stands for it where nothing goes backward."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: ActivationPolicy) -> Tensor:
        out, lse = keep("O", lambda: attention_with_lse(q, k, v))
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        return *attention_backward(grad_out, *ctx.saved_tensors), None


def keep_inputs(q: Tensor, k: Tensor, v: Tensor, keep: ActivationPolicy) -> tuple[Tensor, Tensor, Tensor]:
    """The same three tensors, asked of `keep` under the name "q,k,v"; differentiable."""
    q, k, v = _KeepInputs.apply(keep, q, k, v)
    return q, k, v


class _KeepInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: ActivationPolicy, *inputs: Tensor) -> tuple[Tensor, ...]:
        return keep("q,k,v", lambda: tuple(x.view_as(x) for x in inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *grads


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
    if q.device.type == "npu" and q.dtype in LOW_PRECISION:
        return npu.attention_with_lse(q, k, v)
    kernel = _kernel(q.device, q.dtype, q.shape[-1], min(q.shape[1], k.shape[1]))
    if kernel is None:
        return plain_attention_with_lse(q, k, v)
    out, lse = kernel.forward(*(_heads_first(x) for x in (q, k, v)))
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
    if q.device.type == "npu" and q.dtype in LOW_PRECISION:
        return npu.attention_backward(grad_out, q, k, v, out, lse)
    kernel = _kernel(q.device, q.dtype, q.shape[-1], min(q.shape[1], k.shape[1]))
    if kernel is None:
        return plain_attention_backward(grad_out, q, k, v, out, lse)
    grad_out, q, k, v, out = (_heads_first(x) for x in (grad_out, q, k, v, out))
    grads = kernel.backward(grad_out, q, k, v, out, lse)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
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


def attention_name(device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int) -> str:
    """Name, for people, of the implementation that attention among so many tokens gets."""
    if device.type == "npu" and dtype in LOW_PRECISION:
        return "npu_fusion_attention"
    kernel = _kernel(device, dtype, head_dim, num_tokens)
    return "plain matrix products, which hold all scores" if kernel is None else kernel.name


def _kernel(device: torch.device, dtype: torch.dtype, width: int, shortest: int) -> Kernel | None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    return kernel_of(device.type, dtype, width, shortest, _capability(device), deterministic=deterministic)


@functools.cache  # asking costs the host more than starting a kernel
def _capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device; None of others, and of one that only a fake tensor names."""
    there = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_capability(device) if there else None


def _check_not_empty(q: Tensor, k: Tensor) -> None:
    # The fused CPU kernel divides by these lengths and takes the whole process down.
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError(f"attention needs a query and a key, got {q.shape[1]} queries and {k.shape[1]} keys")


def _heads_first(x: Tensor) -> Tensor:
    """[B, T, N, K] as [B, N, T, K], with neighbouring elements of a head next to each other in memory."""
    # The fused kernels assume that stride without looking, and return wrong numbers otherwise.
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)
