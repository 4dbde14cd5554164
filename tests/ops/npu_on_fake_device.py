"""What this package calls for tensors on a device named "npu", in a process of its own: a device's name is for life."""

import sys
import types
from typing import Any

import torch
from npu_formulas import OPERATORS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch_npu_wheel import Wheel, defined, download

B, T, S, HEADS, HEAD_DIM = 2, 12, 7, 3, 16
WIDTH = HEADS * HEAD_DIM


class Calls(TorchDispatchMode):
    """The operators called with or for tensors on an NPU, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.device.type == "npu" for x in tree_leaves((args, kwargs, result))):
            self.made.append(func)
        return result

    def fused(self) -> list[str]:
        """Names of torch_npu's own operators."""
        return [func._schema.name.removeprefix("npu::") for func in self.made if func.namespace == "npu"]

    def kernels(self) -> list[str]:
        """Names of torch's operators that a device must implement itself: torch has no code for all devices."""
        names = {str(func).removeprefix("aten.") for func in self.made if func.namespace == "aten"}
        for_all = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
        own = [
            name.removesuffix(".default") for name in names
            if not any(
                torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name.removesuffix('.default')}", key)
                for key in for_all
            )
        ]  # fmt: skip
        return sorted(own)


def describe(*tensors: Any) -> list[tuple[list[int], str, str]]:
    return [(list(x.shape), str(x.dtype), x.device.type) for x in tensors]


def observe() -> dict[str, Any]:
    """For each case: the operators called, and shapes, dtypes and devices of what comes out."""
    _setup_privateuseone_for_python_backend("npu")
    found = {}
    # Host memory counts as page-locked: a fake tensor has none that could be.
    torch.Tensor.is_pinned = lambda tensor, device=None: True  # type: ignore[assignment, method-assign]
    with defined(Wheel(download()), OPERATORS), FakeTensorMode():
        for name, case in CASES.items():
            with Calls() as calls:
                results = case()
            found[name] = {"calls": calls.fused(), "results": results}
        found["model"] = model()
        found["type names"] = type_names()  # type: ignore[assignment]
    return found


def segments() -> Any:
    """Attention of two samples in one sequence, through autograd."""
    from mm.ops.attention.packed import segment_attention
    from mm.ops.attention.segments import Pairs, consecutive

    shape = {"dtype": torch.bfloat16, "device": "npu", "requires_grad": True}
    q, k, v = (torch.empty(1, n, HEADS, HEAD_DIM, **shape) for n in (T, S, S))
    out = segment_attention(q, k, v, Pairs.of_rows(consecutive((5, T - 5)), consecutive((3, S - 3))))
    return describe(out, *torch.autograd.grad(out, (q, k, v), torch.empty_like(out)))


def attention(dtype: torch.dtype) -> Any:
    from mm.ops.attention.api import attention_backward, attention_with_lse

    q = torch.empty(B, T, HEADS, HEAD_DIM, dtype=dtype, device="npu")
    k = torch.empty(B, S, HEADS, HEAD_DIM, dtype=dtype, device="npu")
    out, lse = attention_with_lse(q, k, k)
    return describe(out, lse, *attention_backward(out, q, k, k, out, lse))


def elementwise(name: str) -> Any:
    """An operator of `mm.ops.elementwise.autograd` with its gradients."""
    from mm.ops.elementwise import autograd as module
    from mm.ops.elementwise.operators import HeadNorm

    def leaf(*shape: int, dtype: torch.dtype) -> Any:
        return torch.empty(*shape, dtype=dtype, device="npu", requires_grad=True)

    width = WIDTH
    x, vector = leaf(B, T, width, dtype=torch.bfloat16), leaf(width, dtype=torch.bfloat16)
    scale, shift = (leaf(B, 1, width, dtype=torch.float32) for _ in range(2))
    table = torch.empty(T, HEAD_DIM // 2, device="npu")
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm_rope": (x, vector, (table, table), HeadNorm(HEAD_DIM, 1e-6, width)),
        "layer_norm": (x, scale, shift, 1e-6),
        "gated_residual": (x, leaf(B, T, width, dtype=torch.bfloat16), scale),
    }
    leaves = [value for value in arguments[name] if isinstance(value, torch.Tensor)]
    out = getattr(module, name)(*arguments[name])
    return describe(out, *torch.autograd.grad(out, leaves, torch.empty_like(out)))


def model() -> dict[str, Any]:
    """What forward and backward of a whole transformer call."""
    from mm.config.model import WanConfig
    from mm.wan.model import WanModel
    from mm.wan.precision import keep_fp32

    config = WanConfig(hidden_size=WIDTH, ffn_dim=2 * WIDTH, num_heads=HEADS, num_layers=1)
    with torch.device("npu"):
        transformer = WanModel(config)
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data if keep_fp32(name) else parameter.data.bfloat16()
    latents = torch.empty(B, config.in_dim, 1, 4, 4, device="npu")
    text = torch.empty(B, config.text_len, config.text_dim, device="npu")
    with Calls() as calls:
        velocity = transformer.velocity(latents, torch.empty(B, device="npu"), text)
        velocity.backward(torch.empty_like(velocity))
    gradients = {
        str(parameter.grad.device.type) for parameter in transformer.parameters() if parameter.grad is not None
    }
    return {"calls": calls.fused(), "kernels": calls.kernels(), "gradients on": sorted(gradients)}


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
    "segments bf16": segments,
    "rms_norm_rope": lambda: elementwise("rms_norm_rope"),
    "layer_norm": lambda: elementwise("layer_norm"),
    "gated_residual": lambda: elementwise("gated_residual"),
}
