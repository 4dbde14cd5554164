"""Choice of the elementwise operators' implementation for a tensor."""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mm.ops.elementwise.fusable import FusableOperators
from mm.ops.elementwise.npu import NpuOperators
from mm.ops.elementwise.operators import Operators

logger = logging.getLogger(__name__)

_PROGRAMS_A_MULTIPROCESSOR = 2  # as many as its registers hold of the narrower model's
_TOLERANCE = 1e-5  # of the probed kernel's fp32 result, whose sums have another order


def operators_of(x: Tensor) -> Operators:
    """The implementation for a tensor's device.

    Triton's on CUDA where it works, torch_npu's on NPUs, else torch's own functions. Code that torch.compile traces
    gets what it can fuse with its surroundings, on every device.

    A fake tensor may name a device that this machine does not have, and has no memory that a kernel could read.
    """
    if torch.compiler.is_compiling():
        return _FUSABLE
    if isinstance(x, FakeTensor) and x.device.type == "cuda":
        return _PLAIN
    return choice_of(x.device).operators


_PLAIN, _FUSABLE, _NPU = Operators(), FusableOperators(), NpuOperators()


@dataclass(frozen=True)
class Choice:
    """The implementation for a device.

    Attributes:
        operators: what is used. name: for people, and for the comparison of ranks: results of two may differ in bits.
        instead: why the faster ones are not used; None where nothing is missing.
    """

    operators: Operators
    name: str
    instead: str | None = None


@functools.cache  # asked for in every call of an operator
def choice_of(device: torch.device) -> Choice:
    """The implementation for a device, tried out with one kernel and told where it is not the fastest."""
    if device.type == "npu":
        return Choice(_NPU, "torch_npu's")
    if device.type != "cuda":
        return Choice(_PLAIN, "torch's")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    choice = with_triton(device, _PROGRAMS_A_MULTIPROCESSOR * multiprocessors)
    if choice.instead is not None:
        message = "elementwise operators run as torch's own functions, which read memory more often: %s. %s"
        logger.warning(message, choice.instead, TRITON_NEEDS)
    return choice


TRITON_NEEDS = "Triton needs a C compiler and Python's headers: install gcc and python3-dev."


def with_triton(device: torch.device, programs: int) -> Choice:
    """Triton's operators if a kernel of them compiles, starts and computes the right numbers, else torch's.

    Triton compiles what starts its kernels with the C compiler of the machine, at the first one: without this trial it
    would fail in the middle of the first step.

    Args:
        device: where to try. programs: of `mm.ops.elementwise.triton_operators.TritonOperators`.
    """
    if importlib.util.find_spec("triton") is None:
        return Choice(_PLAIN, "torch's", "triton is not installed")
    x = torch.linspace(-1, 1, 128).view(1, 2, 64).to(device)
    one, zero = torch.ones(1, 1, 64, device=device), torch.zeros(1, 1, 64, device=device)
    try:
        from mm.ops.elementwise.triton_operators import TritonOperators  # imports triton, which is not everywhere

        operators = TritonOperators(programs)
        found, _, _ = operators.layer_norm(x, one, zero, 1e-6)
        expected, _, _ = _PLAIN.layer_norm(x, one, zero, 1e-6)
        off = float((found - expected).abs().max())
    except Exception as error:  # compilers fail in ways of their own, and torch's functions need none of them
        text = (str(error).strip().splitlines() or ["no message"])[0]
        return Choice(_PLAIN, "torch's", f"a Triton kernel does not start ({type(error).__name__}: {text})")
    if not off <= _TOLERANCE:
        return Choice(_PLAIN, "torch's", f"a Triton kernel is off by {off:.1e}")
    return Choice(operators, "Triton's")
