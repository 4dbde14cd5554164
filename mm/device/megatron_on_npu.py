"""Runs megatron-core's own DDP, distributed optimizer and schedules on Ascend NPUs.

megatron-core says "cuda" where it means the accelerator. torch_npu's `transfer_to_npu` makes those names mean the NPU,
for the rest of the process: `torch.cuda` becomes `torch.npu`, devices named "cuda" become NPUs, NCCL becomes HCCL. It
leaves out the type names by which megatron-core's optimizers sort parameters, so these are added here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from mm.device.megatron_on_cpu import replaced


class MegatronOnNpu:
    """The adapter of one process; what it changes costs nothing in a call, so our own code stays inside."""

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """CUDA means NPU for everything called in this block."""
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
        with replaced(torch.Tensor, "type", _naming_cuda(torch.Tensor.type)):
            yield

    def outside(self) -> AbstractContextManager[None]:
        """Nothing to leave."""
        return contextlib.nullcontext()


def _naming_cuda(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, whose answer "torch.npu.FloatTensor" becomes "torch.cuda.FloatTensor"."""

    def named(*args: Any, **kwargs: Any) -> Any:
        answer = type_of(*args, **kwargs)
        return answer.replace("torch.npu.", "torch.cuda.") if isinstance(answer, str) else answer

    return named
