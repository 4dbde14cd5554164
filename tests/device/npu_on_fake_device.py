"""What this package calls for tensors on a device named "npu", in a process of its own: a device's name is for life."""

import sys
import types
from typing import Any

import torch
from npu_formulas import OPERATORS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch_npu_wheel import Wheel, defined, download

B, T, S, HEADS, HEAD_DIM = 2, 12, 7, 3, 16


class Calls(TorchDispatchMode):
    """Names of torch_npu's operators in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.names.append(func._schema.name.removeprefix("npu::"))
        return func(*args, **(kwargs or {}))


def describe(*tensors: Any) -> list[tuple[list[int], str, str]]:
    return [(list(x.shape), str(x.dtype), x.device.type) for x in tensors]


def observe() -> dict[str, Any]:
    """For each case: the operators called, and shapes, dtypes and devices of what comes out."""
    _setup_privateuseone_for_python_backend("npu")
    found = {}
    with defined(Wheel(download()), OPERATORS), FakeTensorMode():
        for name, case in CASES.items():
            with Calls() as calls:
                results = case()
            found[name] = {"calls": calls.names, "results": results}
        found["type names"] = type_names()  # type: ignore[assignment]
    return found


def attention(dtype: torch.dtype) -> Any:
    from mm.device.attention import attention_backward, attention_with_lse

    q = torch.empty(B, T, HEADS, HEAD_DIM, dtype=dtype, device="npu")
    k = torch.empty(B, S, HEADS, HEAD_DIM, dtype=dtype, device="npu")
    out, lse = attention_with_lse(q, k, k)
    return describe(out, lse, *attention_backward(out, q, k, k, out, lse))


def lean(name: str) -> Any:
    """An operator of `mm.device.lean` with its gradients."""
    from mm.device import lean as module

    def leaf(*shape: int, dtype: torch.dtype) -> Any:
        return torch.empty(*shape, dtype=dtype, device="npu", requires_grad=True)

    width = HEADS * HEAD_DIM
    x, vector = leaf(B, T, width, dtype=torch.bfloat16), leaf(width, dtype=torch.bfloat16)
    scale, shift = (leaf(B, 1, width, dtype=torch.float32) for _ in range(2))
    table = torch.empty(T, HEAD_DIM // 2, device="npu")
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm_rope": (x, vector, (table, table), HEAD_DIM, 1e-6, width),
        "layer_norm": (x, scale, shift, 1e-6),
        "gated_residual": (x, leaf(B, T, width, dtype=torch.bfloat16), scale),
    }
    leaves = [value for value in arguments[name] if isinstance(value, torch.Tensor)]
    out = getattr(module, name)(*arguments[name])
    return describe(out, *torch.autograd.grad(out, leaves, torch.empty_like(out)))


def type_names() -> list[str]:
    """The name of a parameter's type outside and inside the block around megatron-core."""
    from mm.device.megatron_on_npu import MegatronOnNpu

    # torch_npu itself cannot be loaded without an NPU's libraries; its module is asked for and nothing of it is used
    for name in ("torch_npu", "torch_npu.contrib", "torch_npu.contrib.transfer_to_npu"):
        sys.modules[name] = types.ModuleType(name)
    x = torch.empty(1, dtype=torch.bfloat16, device="npu")
    with MegatronOnNpu().inside():
        inside = x.type()
    return [x.type(), inside]


CASES = {
    "attention bf16": lambda: attention(torch.bfloat16),
    "attention fp16": lambda: attention(torch.float16),
    "attention fp32": lambda: attention(torch.float32),
    "rms_norm_rope": lambda: lean("rms_norm_rope"),
    "layer_norm": lambda: lean("layer_norm"),
    "gated_residual": lambda: lean("gated_residual"),
}
