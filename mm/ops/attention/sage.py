"""Attention in 8 bits by SageAttention, where its package is installed; for inference alone.

Queries and keys are rounded to 8 bits, which is faster and not exact. Shapes: B batch, T tokens, N heads, K head width.

Source: Zhang et al. 2024 (arXiv 2410.02367).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.errors import ConfigError
from mm.ops.attention.api import ActivationPolicy, Attend, keep_nothing
from mm.ops.attention.fused import LOW_PRECISION

PACKAGE = "sageattention"


def open_sage(device: torch.device, dtype: torch.dtype) -> Attend:
    """SageAttention on a device, called as `mm.ops.attention.api.attention` is; nothing goes backward through it.

    Raises:
        ConfigError: CFG-324 where its package is not installed or cannot be imported, CFG-325 for a kind of device or
            a dtype that it has no kernel for. What is returned raises CFG-326 where gradients are asked for.
    """
    if device.type != "cuda" or dtype not in LOW_PRECISION:
        found = f"SageAttention was asked for on {device.type} in {str(dtype).removeprefix('torch.')}."
        raise ConfigError("CFG-325", found, "It runs on CUDA in bf16 and fp16: use these, or exact attention.")
    try:
        from sageattention import sageattn  # absent but where it was installed for this
    except (ImportError, OSError) as error:
        found = f"SageAttention was asked for, and its package {PACKAGE} cannot be imported ({error})."
        raise ConfigError("CFG-324", found, f"Install {PACKAGE}, or use exact attention.") from None

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: ActivationPolicy = keep_nothing) -> Tensor:
        del keep  # nothing is recomputed
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            found = "Gradients were asked for through SageAttention, which has none."
            raise ConfigError("CFG-326", found, "Call the model under torch.no_grad(), or use exact attention.")
        out: Tensor = sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
        return out

    return attend
