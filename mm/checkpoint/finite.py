"""Numbers that may be stored: nothing that is not finite is written, and no rounding makes or hides such a value.

The writers of weight files (`safetensor_file`, `formats.pt_file`) call `require_finite` for every tensor, so no
conversion, merge, export or save has a check of its own. What makes a weight narrower calls `rounded`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.errors import CheckpointError


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in with values of `dtype`, 8-bit floats among them: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, if no element is NaN or infinite.

    Args:
        name: of the tensor, for the message. tensor: of any dtype; integers are always finite.

    Raises:
        CheckpointError: CKPT-016.
    """
    if tensor.is_floating_point() and tensor.numel() and not _finite(_extremes(tensor)):
        bad = tensor.numel() - int(torch.isfinite(tensor.to(wide(tensor.dtype))).sum())
        raise CheckpointError(
            "CKPT-016",
            f"{name} holds {bad} values that are not finite, of {tensor.numel()}; no file is written with such values.",
            "In training, resume from the last checkpoint with a lower learning rate or stricter clipping; else give "
            "weights or an adapter without them.",
        )
    return tensor


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype, rounded once.

    torch makes an infinity or NaN of a value that does not fit, or in e4m3fn the largest number there is, which no
    later check could see; so the extremes are compared before.

    Args:
        name: of the tensor, for the message. value: finite. dtype: floating point.

    Raises:
        CheckpointError: CKPT-016 for a value that is not finite, CKPT-120 for one that `dtype` cannot hold.
    """
    if value.dtype == dtype or not value.numel():
        return value.to(dtype)
    extremes, limit = _extremes(value), torch.finfo(dtype).max
    if not _finite(extremes):
        require_finite(name, value)
    largest = extremes.abs().max().item()
    if largest > limit:
        raise CheckpointError(
            "CKPT-120",
            f"{name} reaches {largest:g}, and {str(dtype).removeprefix('torch.')} ends at {limit:g}; nothing was "
            "written.",
            "Give a base or --ckpt_path in bfloat16 or float32, or an adapter with smaller values or --lora_strength.",
        )
    return value.to(dtype)


def _extremes(tensor: Tensor) -> Tensor:
    """Smallest and largest element; both are NaN where one is. Needs no memory but for 8-bit floats."""
    if tensor.dtype.itemsize == 1:  # torch has no comparisons of them
        tensor = tensor.float()
    return torch.stack(torch.aminmax(tensor.detach()))


def _finite(extremes: Tensor) -> bool:
    return bool(torch.isfinite(extremes).all())
