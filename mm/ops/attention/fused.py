"""Torch's fused attention kernels as pairs of functions: forward with log-sum-exp, and backward from it.

Heads come first here, [B, N, T, K] and [B, N, S, K], because that is how torch's operators see them; lse is [B, N, T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k, v) -> (output, lse)."""

Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(gradient of the output, q, k, v, output, lse) -> (dq, dk, dv)."""

LOW_PRECISION = (torch.float16, torch.bfloat16)
_WIDTH_MULTIPLE = 8  # of a head, for flash and cuDNN
_LSE_MULTIPLE = 32  # of the rows that the efficient kernel writes


@dataclass(frozen=True)
class Kernel:
    """One of torch's kernels.

    Attributes:
        name: for people. forward, backward: the pair.
    """

    name: str
    forward: Forward
    backward: Backward


def kernel_of(
    device_type: str,
    dtype: torch.dtype,
    width: int,
    shortest: int,
    capability: tuple[int, int] | None,
    *,
    deterministic: bool,
) -> Kernel | None:
    """The fastest kernel that takes such tensors; None where torch has none with a log-sum-exp.

    Args:
        device_type: `cpu` or `cuda`, else None is the answer.
        dtype: of q, k and v. width: K.
        shortest: the smaller of T and S.
        capability: of the CUDA device, (major, minor).
        deterministic: whether the same inputs must give the same bits every time. cuDNN's backward adds up in any
            order, and called directly it does not refuse; flash and memory-efficient heed torch's switch.

    On Hopper and data-centre Blackwell cuDNN is about 1.6 times as fast as the flash kernel that torch itself would
    choose; elsewhere flash is faster (Shah et al. 2024, arXiv 2407.08608, figure 5; transformers PR 48163).
    """
    if device_type == "cpu":
        return CPU
    if device_type != "cuda":
        return None
    if dtype in LOW_PRECISION:
        fits_cudnn = width <= 128 and width % _WIDTH_MULTIPLE == 0 and shortest >= 64
        if capability is not None and capability[0] in (9, 10) and fits_cudnn and not deterministic:
            return CUDNN
        return FLASH if width <= 256 else None
    return EFFICIENT if dtype == torch.float32 else None


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


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    return out, lse.squeeze(-1)


def _cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Torch looks a plan of cuDNN up by the layouts of q, k and v, and would read these two in that of an earlier call.
    grad_out, out = _in_layout_of(q, grad_out), _in_layout_of(q, out)
    lengths, seeds = (q.shape[2], k.shape[2]), (_unread(q), _unread(q))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse.contiguous().unsqueeze(-1), *seeds, None, None, None, *lengths, 0.0, False
    )
    return dq, dk, dv


def _flash_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    q, k, v = (pad_width(x) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=width**-0.5)
    return out.narrow(-1, 0, width), lse


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    width = q.shape[-1]
    grad_out, q, k, v, out = (pad_width(x) for x in (grad_out, q, k, v, out))
    tensors = grad_out, q, k, v, out, lse.contiguous()
    lengths, seeds = (q.shape[2], k.shape[2]), (_unread(q), _unread(q))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *tensors, None, None, *lengths, 0.0, False, *seeds, scale=width**-0.5
    )
    return dq.narrow(-1, 0, width), dk.narrow(-1, 0, width), dv.narrow(-1, 0, width)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    return out, lse.narrow(-1, 0, q.shape[2])


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Rows behind the last query weigh nothing: exp(score - inf) is 0.
    missing = -lse.shape[-1] % _LSE_MULTIPLE
    lse = F.pad(lse, (0, missing), value=float("inf")) if missing else lse.contiguous()
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, lse, _unread(q), _unread(q), 0.0, [True, True, True, False]
    )
    return dq, dk, dv


def _in_layout_of(q: Tensor, x: Tensor) -> Tensor:
    """`x` without gaps and with its dims in memory in the order of those of `q`; itself where it lies so already."""
    strides = q.stride()
    order = sorted(range(q.dim()), key=lambda dim: -strides[dim])
    if x.permute(order).is_contiguous():
        return x
    dense = x.permute(order).clone(memory_format=torch.contiguous_format)
    return dense.permute([order.index(dim) for dim in range(q.dim())])


def _unread(q: Tensor) -> Tensor:
    """The random state of the forward, which nothing reads without dropout."""
    return torch.empty((), dtype=torch.int64, device=q.device)


def pad_width(x: Tensor) -> Tensor:
    """Zeros behind every head up to the multiple the kernel takes; they change no score and no output."""
    missing = -x.shape[-1] % _WIDTH_MULTIPLE
    return F.pad(x, (0, missing)) if missing else x


CPU = Kernel("flash (CPU)", _cpu_forward, _cpu_backward)
CUDNN = Kernel("cuDNN", _cudnn_forward, _cudnn_backward)
FLASH = Kernel("flash", _flash_forward, _flash_backward)
EFFICIENT = Kernel("memory-efficient", _efficient_forward, _efficient_backward)
