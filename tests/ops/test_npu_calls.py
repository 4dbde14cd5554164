"""The NPU paths without an NPU: calls against torch_npu's published wheel, arithmetic against the plain references.

The values around the operators are computed twice: everywhere with the formulas of torch_npu's documentation in the
operators' place, and by the operators themselves where there is an NPU.
"""

import importlib.util
import multiprocessing
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import npu_on_fake_device as fake
import pytest
import torch
from npu_formulas import OPERATORS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_npu_wheel import UnreachableError, Wheel, defined, download

from mm.ops.attention import npu as npu_attention
from mm.ops.attention.api import plain_attention_backward, plain_attention_with_lse
from mm.ops.attention.segments import Lengths, consecutive
from mm.ops.elementwise import npu, reference
from mm.ops.elementwise.operators import HeadNorm
from mm.parallel.ring import merge_attention
from mm.wan.rope import rope_tables

B, T, S, HEADS, HEAD_DIM, EPS = 2, 12, 7, 3, 16, 1e-6
WIDTH = HEADS * HEAD_DIM
NORM = HeadNorm(HEAD_DIM, EPS, WIDTH)
HAS_NPU = importlib.util.find_spec("torch_npu") is not None
NEEDS_NPU = pytest.mark.skipif(not HAS_NPU, reason="no torch_npu here")
PLACES = [
    pytest.param(("cpu", torch.float64), id="formulas"),
    pytest.param(("npu", torch.bfloat16), id="hardware", marks=NEEDS_NPU),
]
BOUNDS = {torch.float64: 1e-12, torch.bfloat16: 2**-7}  # largest error over largest value


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    try:
        return Wheel(download())
    except UnreachableError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def operators(wheel: Wheel) -> Iterator[None]:
    if HAS_NPU:
        pytest.skip("torch_npu is here, and torch.ops.npu are its operators")
    with defined(wheel, OPERATORS):
        yield


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """(device, dtype)."""
    if request.param[0] == "cpu":
        request.getfixturevalue("operators")
    return request.param  # type: ignore[no-any-return]


def random(*shape: int, seed: int, place: tuple[Any, torch.dtype]) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(*place)


def exact(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().cpu().double() for x in tensors]


def assert_close(found: Any, expected: Any, place: tuple[str, torch.dtype]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a.cpu().double() - b).abs().max() <= BOUNDS[place[1]] * b.abs().max()


def attention_inputs(place: tuple[Any, torch.dtype]) -> list[Tensor]:
    """q, k, v and the gradient of the output; scores reach about 20, where exp needs the maximum taken off."""
    lengths = (T, S, S, T)
    return [random(B, n, HEADS, HEAD_DIM, seed=i, place=place) * 3 for i, n in enumerate(lengths)]


def test_attention(place: tuple[str, torch.dtype]) -> None:
    """lse = max + log(sum), and the backward from (lse, 1) instead of (max, sum)."""
    q, k, v, grad = attention_inputs(place)
    out, lse = npu_attention.attention_with_lse(q, k, v)
    grads = npu_attention.attention_backward(grad, q, k, v, out, lse)
    expected = plain_attention_with_lse(*exact(q, k, v))
    assert_close((out, lse), expected, place)
    assert_close(grads, plain_attention_backward(*exact(grad, q, k, v), *expected), place)


def test_attention_of_blocks_of_keys(place: tuple[str, torch.dtype]) -> None:
    """Ring attention: a block's backward gets output and log-sum-exp of all keys."""
    q, k, v, grad = attention_inputs(place)
    cuts = [slice(0, 2), slice(2, 3), slice(3, S)]
    out, lse = npu_attention.attention_with_lse(q, k[:, cuts[0]], v[:, cuts[0]])
    out = out.to(lse.dtype)
    for cut in cuts[1:]:
        out, lse = merge_attention(out, lse, *npu_attention.attention_with_lse(q, k[:, cut], v[:, cut]))
    blocks = [npu_attention.attention_backward(grad, q, k[:, cut], v[:, cut], out.to(q.dtype), lse) for cut in cuts]
    dq = sum(block[0].double() for block in blocks)
    dk, dv = (torch.cat([block[i] for block in blocks], dim=1) for i in (1, 2))
    whole, whole_lse = plain_attention_with_lse(*exact(q, k, v))
    assert_close((out, lse), (whole, whole_lse), place)
    assert_close((dq, dk, dv), plain_attention_backward(*exact(grad, q, k, v), whole, whole_lse), place)


def test_attention_of_many_sequences_in_one_call(place: tuple[str, torch.dtype]) -> None:
    """The layout of all tokens one after the other, and the backward from the log-sum-exp of more keys."""
    counts = (5, 4, 3), (2, 1, 4)
    q, k, v, grad = [x[0] for x in attention_inputs(place)]
    lengths = Lengths(*counts, torch.empty(0), torch.empty(0), 5, 4)
    out, lse = npu_attention.varlen_attention_with_lse(q, k, v, lengths)
    assert (out.shape, lse.shape) == (q.shape, (HEADS, T))
    more = lse + 1  # as if other keys had weight too
    grads = npu_attention.varlen_attention_backward(grad, q, k, v, out, more, lengths)
    rows = [consecutive(side) for side in counts]
    for mine, keys in zip(*rows, strict=True):
        one = exact(q[None, mine], k[None, keys], v[None, keys])
        expected = plain_attention_with_lse(*one)
        assert_close((out[None, mine], lse[None, :, mine]), expected, place)
        expected_grads = plain_attention_backward(*exact(grad[None, mine]), *one, expected[0], expected[1] + 1)
        assert_close([x[None, r] for x, r in zip(grads, (mine, keys, keys), strict=True)], expected_grads, place)


def norm_inputs(place: tuple[Any, torch.dtype]) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """x, weight and the gradient of the output; cosines and sines of a latent of 1 x 3 x 4 patches."""
    x = random(B, T, WIDTH, seed=1, place=place) * 3 + 1
    grad = random(B, T, HEADS, HEAD_DIM, seed=3, place=place)
    wide = torch.float64 if place[1] == torch.float64 else torch.float32
    cos, sin = (table.to(place[0], wide) for table in rope_tables((1, 3, 4), HEAD_DIM))
    return [x, random(WIDTH, seed=2, place=place), grad], (cos, sin)


def norm_reference(x: Tensor, weight: Tensor, rotation: Any, grad: Tensor) -> list[Tensor]:
    """Value and gradients of x and weight, from the plain kernels and autograd."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    heads = reference.rms_norm(x, weight, EPS).unflatten(-1, (-1, HEAD_DIM))
    out = heads if rotation is None else reference.apply_rope(heads, *rotation)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad)]


@pytest.mark.parametrize("rotated", [True, False], ids=["rope", "no rope"])
def test_norm_and_rotation(place: tuple[str, torch.dtype], rotated: bool) -> None:
    (x, weight, grad), tables = norm_inputs(place)
    rotation = tables if rotated else None
    out, rstd = npu.NpuOperators().rms_norm_rope(x, weight, rotation, NORM)
    assert rstd.shape == (B, T, 1)
    found = npu.NpuOperators().rms_norm_rope_backward(grad, x, weight, rotation, rstd, NORM)
    assert [value.dtype for value in (out, *found)] == [place[1]] * 3
    exact_rotation = exact(*tables) if rotated else None
    assert_close((out, *found), norm_reference(*exact(x, weight), exact_rotation, *exact(grad)), place)


class TwoRanks:
    """Two threads that add up tensors as two ranks would."""

    def __init__(self) -> None:
        self.shares: dict[int, Tensor] = {}
        self.meet = threading.Barrier(2, timeout=20)

    def sum_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def add_up(share: Tensor) -> Tensor:
            self.shares[rank] = share
            self.meet.wait()
            total = self.shares[0] + self.shares[1]
            self.meet.wait()
            return total

        return add_up


def test_norm_of_a_width_that_ranks_share(place: tuple[str, torch.dtype]) -> None:
    (x, weight, grad), tables = norm_inputs(place)
    x, weight, grad = torch.cat((x, 5 * x.flip(1)), -1), torch.cat((weight, weight + 1)), torch.cat((grad, -grad), 2)
    ranks = TwoRanks()

    def run(rank: int) -> list[Tensor]:
        mine = slice(rank * WIDTH, (rank + 1) * WIDTH)
        inputs, norm = (x[..., mine], weight[mine], tables), HeadNorm(HEAD_DIM, EPS, 2 * WIDTH, ranks.sum_of(rank))
        out, rstd = npu.NpuOperators().rms_norm_rope(*inputs, norm)
        share = grad[:, :, rank * HEADS : (rank + 1) * HEADS]
        return [out, *npu.NpuOperators().rms_norm_rope_backward(share, *inputs, rstd, norm)]

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(run, (0, 1))
    found = [torch.cat(shares, dim) for *shares, dim in zip(first, second, (2, 2, 0), strict=True)]
    assert_close(found, norm_reference(*exact(x, weight), exact(*tables), *exact(grad)), place)


def test_many_heads_and_samples(place: tuple[str, torch.dtype]) -> None:
    """More heads in all samples together than the interleaved operator takes at once."""
    samples = 1000 // HEADS + 1
    x = random(samples, 1, WIDTH, seed=1, place=place)
    weight = torch.ones(WIDTH).to(*place)
    cos, sin = (table[5:6].to(x.device) for table in rope_tables((1, 3, 4), HEAD_DIM))
    out, _ = npu.NpuOperators().rms_norm_rope(x, weight, (cos, sin), NORM)
    heads = reference.rms_norm(*exact(x, weight), EPS).unflatten(-1, (-1, HEAD_DIM))
    assert_close((out,), (reference.apply_rope(heads, *exact(cos, sin)),), place)


@pytest.mark.usefixtures("operators")
def test_bf16_is_rounded_once() -> None:
    (x, weight, grad), tables = norm_inputs(("cpu", torch.bfloat16))
    out, rstd = npu.NpuOperators().rms_norm_rope(x, weight, tables, NORM)
    dx, _ = npu.NpuOperators().rms_norm_rope_backward(grad, x, weight, tables, rstd, NORM)
    assert rstd.dtype == torch.float32
    expected = norm_reference(*exact(x, weight), exact(*tables), *exact(grad))
    for a, b in zip((out, dx), expected[:2], strict=True):
        assert ((a.double() - b).abs() <= 2**-8 * b.abs() + 1e-5).all()


class Recorded(TorchDispatchMode):
    """Calls of torch_npu's operators with what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "npu":
            self.calls.append((func, args, kwargs or {}, result))
        return result


@pytest.mark.usefixtures("operators")
def test_results_have_the_shapes_that_the_wheel_says() -> None:
    """Names and arguments are checked by the dispatcher, which has the wheel's schemas; here what the calls return."""
    with Recorded() as recorded:
        q, k, v, grad = attention_inputs(("cpu", torch.bfloat16))
        out, lse = npu_attention.attention_with_lse(q, k, v)
        npu_attention.attention_backward(grad, q, k, v, out, lse)
        lengths = Lengths((5, 7), (3, 4), torch.empty(0), torch.empty(0), 7, 4)
        rows = [x[0] for x in (q, k, v, grad)]
        of_rows = npu_attention.varlen_attention_with_lse(*rows[:3], lengths)
        npu_attention.varlen_attention_backward(rows[3], *rows[:3], *of_rows, lengths)
        (x, weight, grad), tables = norm_inputs(("cpu", torch.bfloat16))
        _, rstd = npu.NpuOperators().rms_norm_rope(x, weight, tables, NORM)
        npu.NpuOperators().rms_norm_rope_backward(grad, x, weight, tables, rstd, NORM)
    assert {func._schema.name.removeprefix("npu::") for func, *_ in recorded.calls} == set(OPERATORS)
    assert (lse.shape, lse.dtype) == ((B, HEADS, T), torch.float32)
    for func, args, kwargs, result in recorded.calls:
        to_meta: Callable[[Any], Any] = lambda value: value.to("meta") if isinstance(value, Tensor) else value  # noqa: E731
        said = func(*map(to_meta, args), **{name: to_meta(value) for name, value in kwargs.items()})
        results, saids = (value if isinstance(value, tuple) else (value,) for value in (result, said))
        used = {"npu_fusion_attention": 3, "npu_fusion_attention_grad": 3}  # the rest is reserved or for dropout
        for a, b in list(zip(results, saids, strict=True))[: used.get(func._schema.name.removeprefix("npu::"))]:
            assert (a.shape, a.dtype) == (b.shape, b.dtype), func


@pytest.fixture(scope="module")
def on_fake_npu(wheel: Wheel) -> dict[str, Any]:
    """What happens to tensors whose device is an NPU, seen in a process in which fake tensors can be on one."""
    if HAS_NPU:
        pytest.skip("torch_npu is here, and the device's name is taken")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(fake.observe).result(timeout=120)


ATTENTION = ["npu_fusion_attention", "npu_fusion_attention_grad"]
CALLS = {
    "attention bf16": ATTENTION,
    "attention fp16": ATTENTION,
    "attention fp32": [],
    "segments bf16": ATTENTION,
    "rms_norm_rope": ["npu_rms_norm", "npu_rotary_mul", "npu_rotary_mul", "npu_rms_norm_backward"],
    "layer_norm": [],
    "gated_residual": [],
}
# queries and keys of self-attention, which are turned, and of cross-attention, which are not
CALLS_OF_A_BLOCK = (
    4 * ["npu_rms_norm", "npu_rms_norm_backward"]
    + 4 * ["npu_rotary_mul"]
    + 2 * ["npu_fusion_attention", "npu_fusion_attention_grad"]
)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_on_an_npu_take_the_fused_operators(on_fake_npu: dict[str, Any], name: str) -> None:
    found = on_fake_npu[name]
    assert found["calls"] == CALLS[name]
    heads, keys, stream = [B, T, HEADS, HEAD_DIM], [B, S, HEADS, HEAD_DIM], [B, T, WIDTH]
    shapes = {
        "attention": [heads, [B, HEADS, T], heads, keys, keys],
        "segments": [[1, *heads[1:]], [1, *heads[1:]], [1, *keys[1:]], [1, *keys[1:]]],
        "rms_norm_rope": [heads, stream, [WIDTH]],
        "layer_norm": [stream, stream, [B, 1, WIDTH], [B, 1, WIDTH]],
        "gated_residual": [stream, stream, stream, [B, 1, WIDTH]],
    }
    assert [shape for shape, _, _ in found["results"]] == shapes[name.split()[0]]
    assert {device for *_, device in found["results"]} == {"npu"}
    narrow = {"attention fp16": "torch.float16", "attention fp32": "torch.float32"}.get(name, "torch.bfloat16")
    fp32 = {"attention": [1], "layer_norm": [2, 3], "gated_residual": [3]}.get(name.split()[0], [])
    dtypes = ["torch.float32" if i in fp32 else narrow for i in range(len(found["results"]))]
    assert [dtype for _, dtype, _ in found["results"]] == dtypes


def test_torch_npu_implements_all_that_the_model_calls(on_fake_npu: dict[str, Any], wheel: Wheel) -> None:
    """Forward and backward of a block with its embeddings and head: torch_npu's own operators, and torch's."""
    model = on_fake_npu["model"]
    assert model["gradients on"] == ["npu"]
    assert sorted(model["calls"]) == sorted(CALLS_OF_A_BLOCK)
    assert len(model["kernels"]) > 20  # mm, addmm, bmm, native_layer_norm, ...
    implemented = wheel.kernels()
    assert [name for name in model["kernels"] if not {name, f"{name.split('.')[0]}.out"} & implemented] == []


def test_megatron_finds_the_names_of_types_that_it_looks_for(on_fake_npu: dict[str, Any], wheel: Wheel) -> None:
    assert on_fake_npu["type names"] == ["torch.npu.BFloat16Tensor", "torch.cuda.BFloat16Tensor"]
    patches = wheel.text("torch_npu/contrib/transfer_to_npu.py")
    assert "['cuda', torch_npu.npu]" in patches
    assert "torch.Tensor.type" not in patches  # it would be superfluous here


# what `mm.device.backend.Backend` and `select` call, with a device or without
BACKEND_CALLS = {
    ("torch_npu/npu/utils.py", "synchronize"): (),
    ("torch_npu/npu/utils.py", "set_device"): (torch.device("cpu"),),
    ("torch_npu/npu/memory.py", "max_memory_allocated"): (),
    ("torch_npu/npu/__init__.py", "get_device_name"): (torch.device("cpu"),),
    ("torch_npu/npu/__init__.py", "device_count"): (),
    ("torch_npu/npu/__init__.py", "is_available"): (),
}


@pytest.mark.parametrize(("member", "function"), BACKEND_CALLS, ids=[name for _, name in BACKEND_CALLS])
def test_the_backend_calls_what_there_is(wheel: Wheel, member: str, function: str) -> None:
    wheel.signature(member, function).bind(*BACKEND_CALLS[member, function])
    assert f'"{function}"' in wheel.text("torch_npu/npu/__init__.py").split("__all__")[1].split("]")[0]


def test_hccl_is_a_backend_of_torch_distributed(wheel: Wheel) -> None:
    text = wheel.text("torch_npu/_init/registry/distributed.py")
    assert re.search(r'register_backend\(\s*"hccl"', text)
