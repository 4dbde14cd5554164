"""fp32 that is fp32: accelerators otherwise round the factors of fp32 convolutions to ten bits and say nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def true_fp32() -> Iterator[None]:
    """Compute convolutions and matrix products of fp32 tensors in fp32 inside the block (or the decorated function).

    By default cuDNN's convolutions take TF32 and those of NPUs HF32, which have 10 and 11 bits of mantissa; matrix
    products take fp32 on both, unless somebody changed that.
    """
    switches: list[tuple[Any, str, Any]] = [
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]  # made at import
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    ]
    npu = getattr(torch, "npu", None)  # there once torch_npu was imported
    if npu is not None:
        switches += [(npu.conv, "allow_hf32", False), (npu.matmul, "allow_hf32", False)]
    before = [getattr(holder, name) for holder, name, _ in switches]
    for holder, name, value in switches:
        setattr(holder, name, value)
    try:
        yield
    finally:
        for (holder, name, _), value in zip(switches, before, strict=True):
            setattr(holder, name, value)
