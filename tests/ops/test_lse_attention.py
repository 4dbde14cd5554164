"""Attention with log-sum-exp, and its backward, against torch's attention in fp64."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mm.device.backend import deterministic
from mm.device.queues import page_locked
from mm.ops.attention import api as dispatched
from mm.ops.attention.api import (
    attention_backward,
    attention_name,
    attention_with_lse,
    plain_attention_backward,
    plain_attention_with_lse,
)
from mm.ops.attention.fused import CPU, CUDNN, EFFICIENT, FLASH, Kernel, kernel_of
from mm.parallel.ring import merge_attention

PATHS = {
    "dispatched": (attention_with_lse, attention_backward),
    "plain": (plain_attention_with_lse, plain_attention_backward),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
# Largest error over largest value: a few units in the last place of each dtype.
BOUNDS = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# B, T, S, N, K: more queries than keys and fewer, one of each, odd widths, too wide for CUDA's kernel, many blocks
SHAPES = [(2, 5, 7, 3, 12), (2, 40, 3, 2, 300), (1, 1, 1, 1, 7), (1, 70, 600, 2, 128)]


def tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, width = shape
    source = torch.Generator().manual_seed(queries)

    def draw(tokens: int) -> Tensor:
        return torch.randn(batch, tokens, heads, width, generator=source, dtype=torch.float64).to(device, dtype)

    return draw(queries), draw(keys), draw(keys), draw(queries)


def reference(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Output, log-sum-exp, dq, dk, dv from torch's mathematical attention and autograd, in fp64 on the CPU."""
    q, k, v = (x.detach().cpu().double().requires_grad_() for x in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    scores = q.detach().transpose(1, 2) @ k.detach().permute(0, 2, 3, 1) / q.shape[-1] ** 0.5
    grads = torch.autograd.grad(out, (q, k, v), grad_out.cpu().double())
    return [out.detach(), scores.logsumexp(-1), *grads]


def error(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    assert found.shape == expected.shape
    return float((found.cpu().double() - expected).abs().max() / (expected.abs().max() if scale is None else scale))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch_attention(shape: tuple[int, ...], dtype: torch.dtype, path: str, device: str) -> None:
    forward, backward = PATHS[path]
    q, k, v, grad_out = tensors(shape, dtype, device)
    out, lse = forward(q, k, v)
    grads = backward(grad_out, q, k, v, out, lse)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {x.dtype for x in (out, *grads)} == {dtype}
    expected = reference(q, k, v, grad_out)
    assert error(lse, expected[1]) < BOUNDS[torch.float64 if dtype == torch.float64 else torch.float32]
    scale = expected[4].abs().max() if shape[2] == 1 else None  # the softmax over one key is 1: dq and dk are zero
    for found, wanted in zip((out, *grads), (expected[0], *expected[2:]), strict=True):
        assert error(found, wanted, scale) < BOUNDS[dtype]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_blocks_of_keys_make_up_the_whole(dtype: torch.dtype, path: str, device: str) -> None:
    """Outputs merge by their log-sum-exp; a block's backward takes the output and log-sum-exp of all keys."""
    forward, backward = PATHS[path]
    q, k, v, grad_out = tensors((2, 6, 11, 3, 16), dtype, device)
    expected = reference(q, k, v, grad_out)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 11)]
    out, lse = forward(q, k[:, cuts[0]], v[:, cuts[0]])
    out = out.to(lse.dtype)
    for cut in cuts[1:]:
        out, lse = merge_attention(out, lse, *forward(q, k[:, cut], v[:, cut]))
    assert error(out, expected[0]) < BOUNDS[dtype]
    blocks = [backward(grad_out, q, k[:, cut], v[:, cut], out.to(dtype), lse) for cut in cuts]
    dq = sum(block[0].double() for block in blocks)
    dk, dv = (torch.cat([block[i] for block in blocks], dim=1) for i in (1, 2))
    for found, wanted in zip((dq, dk, dv), expected[2:], strict=True):
        assert error(found, wanted) < 2 * BOUNDS[dtype]  # the output itself was rounded to the dtype once


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("source", ["merged", "plain", "fp64"])
def test_backward_of_long_blocks_takes_any_log_sum_exp(dtype: torch.dtype, source: str, device: str) -> None:
    """Blocks of 64 keys and more, as cuDNN takes them, with the log-sum-exp of all keys from elsewhere."""
    q, k, v, grad_out = tensors((2, 150, 262, 3, 64), dtype, device)
    expected = reference(q, k, v, grad_out)
    cuts = [slice(0, 64), slice(64, 134), slice(134, 262)]
    if source == "merged":
        out, lse = attention_with_lse(q, k[:, cuts[0]], v[:, cuts[0]])
        out = out.to(lse.dtype)
        for cut in cuts[1:]:
            out, lse = merge_attention(out, lse, *attention_with_lse(q, k[:, cut], v[:, cut]))
    elif source == "plain":
        out, lse = plain_attention_with_lse(q, k, v)
    else:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out, lse = expected[0].to(device), expected[1].to(device, wide)
    assert error(lse, expected[1]) < BOUNDS[torch.float64 if dtype == torch.float64 else torch.float32]
    blocks = [attention_backward(grad_out, q, k[:, cut], v[:, cut], out.to(dtype), lse) for cut in cuts]
    dq = sum(block[0].double() for block in blocks)
    dk, dv = (torch.cat([block[i] for block in blocks], dim=1) for i in (1, 2))
    for found, wanted in zip((dq, dk, dv), expected[2:], strict=True):
        assert error(found, wanted) < 2 * BOUNDS[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device: str) -> None:
    """torch's fused CPU kernel reads a head whose elements are apart as if they were not, and says nothing."""
    q, k, v, grad_out = tensors((2, 5, 7, 3, 16), torch.bfloat16, device)
    out, lse = attention_with_lse(q, k, v)
    expected = (out, lse, *attention_backward(grad_out, q, k, v, out, lse))
    q, k, v, grad_out = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v, grad_out))
    out, lse = attention_with_lse(q, k, v)
    found = (out, lse, *attention_backward(grad_out, q, k, v, out, lse))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ones = torch.ones((), dtype=out.dtype, device=device).expand_as(out)  # what the gradient of a sum looks like
    expanded = attention_backward(ones, q, k, v, out, lse)
    dense = attention_backward(ones.contiguous(), q, k, v, out, lse)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_nothing_to_attend_is_refused() -> None:
    some, none = torch.zeros(1, 2, 1, 8), torch.zeros(1, 0, 1, 8)
    for q, k in ((some, none), (none, some)):
        with pytest.raises(ValueError, match="needs a query and a key"):
            attention_with_lse(q, k, k)
        with pytest.raises(ValueError, match="needs a query and a key"):
            attention_backward(q, q, k, k, q, q[..., 0].transpose(1, 2))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "shortest", "capability", "kernel"),
    [
        ("cpu", torch.float64, 300, 1, None, CPU),
        ("cuda", torch.bfloat16, 128, 32760, (9, 0), CUDNN),
        ("cuda", torch.float16, 64, 512, (10, 0), CUDNN),
        ("cuda", torch.bfloat16, 128, 5, (9, 0), FLASH),
        ("cuda", torch.bfloat16, 160, 512, (9, 0), FLASH),
        ("cuda", torch.bfloat16, 12, 512, (9, 0), FLASH),
        ("cuda", torch.bfloat16, 128, 512, (8, 0), FLASH),
        ("cuda", torch.bfloat16, 128, 512, (12, 0), FLASH),
        ("cuda", torch.bfloat16, 300, 512, (9, 0), None),
        ("cuda", torch.float32, 128, 512, (9, 0), EFFICIENT),
        ("cuda", torch.float64, 128, 512, (9, 0), None),
        ("npu", torch.float32, 128, 512, None, None),
    ],
)
def test_which_kernel_is_taken(
    device: str,
    dtype: torch.dtype,
    width: int,
    shortest: int,
    capability: tuple[int, int] | None,
    kernel: Kernel | None,
) -> None:
    assert kernel_of(device, dtype, width, shortest, capability, deterministic=False) is kernel
    # cuDNN's backward has another order of additions each time; torch makes the others' one by the same switch
    kept = FLASH if kernel is CUDNN else kernel
    assert kernel_of(device, dtype, width, shortest, capability, deterministic=True) is kept


def test_the_switch_of_torch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatched, "_capability", lambda device: (9, 0))
    names = []
    for enabled in (False, True):
        with deterministic(enabled):
            names.append(attention_name(torch.device("cuda"), torch.bfloat16, 128, 32760))
    assert names == ["cuDNN", "flash"]


def test_a_device_is_asked_for_its_capability_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    dispatched._capability.cache_clear()
    names = {attention_name(torch.device("cuda"), torch.bfloat16, 128, 64) for _ in range(3)}
    dispatched._capability.cache_clear()
    assert (names, len(asked)) == ({"cuDNN"}, 1)


class Strides(TorchDispatchMode):
    """The strides with which cuDNN's backward is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._scaled_dot_product_cudnn_attention_backward:
            self.seen += [x.stride() for x in (args[0], args[4])]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("of_q", ["tokens first", "heads first", "a part of longer ones"])
def test_cudnn_sees_the_gradient_and_the_output_in_the_layout_of_q(of_q: str) -> None:
    """It looks its plan up by the layouts of q, k and v alone."""
    with FakeTensorMode():
        q, k, v, out, grad_out = (torch.empty(2, 3, 70, 64, dtype=torch.bfloat16, device="cuda") for _ in range(5))
        if of_q == "tokens first":
            q = torch.empty(2, 70, 3, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        elif of_q == "a part of longer ones":
            q = torch.empty(2, 80, 3, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2).narrow(2, 0, 70)
        lse = torch.empty(2, 3, 70, device="cuda")
        expanded, like_q = grad_out.new_empty(()).expand(q.shape), torch.empty_like(q)
        with Strides() as strides:
            CUDNN.backward(expanded, q, k, v, out, lse)
            CUDNN.backward(grad_out, q, k, v, like_q, lse)
    dense = (70 * 3 * 64, 70 * 64, 64, 1) if of_q == "heads first" else (70 * 3 * 64, 64, 3 * 64, 1)
    assert strides.seen == [dense] * 4


@pytest.mark.parametrize(
    ("kernel", "dtype"), [(CUDNN, torch.bfloat16), (FLASH, torch.bfloat16), (EFFICIENT, torch.float32)]
)
def test_calls_of_cuda_kernels_fit_their_schemas(kernel: Kernel, dtype: torch.dtype) -> None:
    """A fake tensor needs no device: torch checks arguments and gives the shapes of the results."""
    with FakeTensorMode():
        q, k, v, grad_out = (
            torch.empty(2, tokens, 3, 64, dtype=dtype, device="cuda").transpose(1, 2) for tokens in (70, 90, 90, 70)
        )
        out, lse = kernel.forward(q, k, v)
        grads = kernel.backward(grad_out, q, k, v, out, lse)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (2, 3, 70), torch.float32)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]


@pytest.mark.parametrize("width", [12, 128])
@pytest.mark.parametrize(
    ("device", "dtype"),
    # a fake tensor needs no device, so that the calls of the fused CUDA kernels are checked everywhere
    [("cpu", torch.float64), ("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)],
    ids=str,
)
def test_fake_tensors_go_through(device: str, dtype: torch.dtype, width: int) -> None:
    with FakeTensorMode():
        q = torch.empty(2, 5, 3, width, dtype=dtype, device=device)
        k = torch.empty(2, 7, 3, width, dtype=dtype, device=device)
        out, lse = attention_with_lse(q, k, k)
        grads = attention_backward(out, q, k, k, out, lse)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 3, 5), torch.float64 if dtype == torch.float64 else torch.float32)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, k)]
    assert {x.device.type for x in (out, lse, *grads)} == {device}


def test_no_memory_is_not_locked() -> None:
    """CUDA refuses to register nothing, which a pool without slots asks for."""
    assert page_locked("cuda", 0).shape == (0,)
