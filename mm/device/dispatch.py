"""Which implementation of the elementwise operators a tensor gets."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mm.device.fusable import FusableOperators
from mm.device.npu import NpuOperators
from mm.device.operators import Operators, PlainOperators

_PROGRAMS_A_MULTIPROCESSOR = 2  # as many as its registers hold of the narrower model's


def operators_of(x: Tensor) -> Operators:
    """The implementation for a tensor's device.

    Triton's on CUDA where triton is installed, torch_npu's on NPUs, else torch's own functions. Code that torch.compile
    traces gets what it can fuse with its surroundings, on every device.

    A fake tensor may name a device that this machine does not have, and has no memory that a kernel could read.
    """
    if torch.compiler.is_compiling():
        return _FUSABLE
    if x.device.type == "cuda" and not isinstance(x, FakeTensor):
        return _on_cuda(x.device)
    return _NPU if x.device.type == "npu" else _PLAIN


_PLAIN, _FUSABLE, _NPU = PlainOperators(), FusableOperators(), NpuOperators()


@functools.cache
def _on_cuda(device: torch.device) -> Operators:
    if importlib.util.find_spec("triton") is None:
        return _PLAIN
    from mm.device.triton_operators import TritonOperators  # imports triton, which is not everywhere

    properties = torch.cuda.get_device_properties(device)
    return TritonOperators(programs=_PROGRAMS_A_MULTIPROCESSOR * properties.multi_processor_count)
