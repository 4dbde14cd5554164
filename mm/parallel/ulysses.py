"""Ulysses context parallelism: exchange a share of the tokens with all heads for all tokens with a share of the heads.

Attention itself needs every token and treats heads apart, so between two such exchanges it runs as on one device.
Shapes: B batch, U ranks of the Ulysses group, c tokens of a rank (equal on all), N heads, K head width.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv 2309.14509), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.ops.attention.api import ActivationPolicy, keep_nothing


def scatter_heads(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, keep: ActivationPolicy = keep_nothing
) -> tuple[Tensor, Tensor, Tensor]:
    """Give heads away and gather tokens, for all three tensors in one all-to-all; differentiable.

    Args:
        q, k, v: [B, c, N, K], this rank's tokens; U divides N.
        group: the Ulysses group; its rank u holds the u-th c tokens.
        keep: is asked for the result under the name "q,k,v".

    Returns:
        Three [B, c*U, N/U, K]: all tokens in order, of the heads [u*N/U, (u+1)*N/U).
    """
    q, k, v = _ScatterHeads.apply(group, keep, q, k, v)
    return q, k, v


def gather_heads(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The reverse, for one tensor in one all-to-all: [B, c*U, N/U, K] to [B, c, N, K]; differentiable."""
    gathered: Tensor = _GatherHeads.apply(group, out)
    return gathered


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, keep: ActivationPolicy, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return keep("q,k,v", lambda: _tokens_for_heads(tensors, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_heads_for_tokens(grads, ctx.group)


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
        ctx.group = group
        return _heads_for_tokens((tensor,), group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_tokens_for_heads((grad,), ctx.group)


def _tokens_for_heads(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Each [B, c, N, K] becomes [B, c*U, N/U, K]."""
    # [U, B, c, N/U, K]: by the rank that gets these heads, and after the exchange by the rank that had these tokens
    outgoing = [x.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4) for x in tensors]
    incoming = _all_to_all(outgoing, group)
    return tuple(x.transpose(0, 1).flatten(1, 2) for x in incoming)


def _heads_for_tokens(tensors: tuple[Tensor, ...], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Each [B, c*U, N/U, K] becomes [B, c, N, K]."""
    outgoing = [x.unflatten(1, (group.size(), -1)).transpose(0, 1) for x in tensors]
    incoming = _all_to_all(outgoing, group)
    return tuple(x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in incoming)


def _all_to_all(tensors: list[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Exchange the leading dim [U, ...] of tensors of one shape in one call."""
    packed = torch.stack(tensors, dim=1)  # one contiguous copy, whatever the strides
    received = torch.empty_like(packed)
    dist.all_to_all_single(received, packed, group=group)
    return received.unbind(1)
