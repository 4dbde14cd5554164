"""The Triton operators against the plain references in fp64 that autograd differentiates.

On a machine without CUDA the kernels run in Triton's interpreter (tests/conftest.py), slowly, hence the tiny shapes.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mm.ops.elementwise import reference
from mm.ops.elementwise.dispatch import operators_of, with_triton
from mm.ops.elementwise.operators import HeadNorm, Operators

pytest.importorskip("triton", reason="triton is not installed")
from mm.ops.elementwise.triton_operators import TritonOperators

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = TritonOperators(programs=3)
EPS = 1e-6
# B, T, heads, head width: three heads of 16, one tile that rows do not fill and strips of unequal length; the width of
# Wan 1.3B, whose rows are fewer a tile; whole tiles of a width that is a power of two; the one of 14B, one row a tile
SHAPES = [(2, 37, 3, 16), (1, 5, 12, 128), (3, 32, 1, 64), (1, 3, 40, 128)]
FP32_ULP = 2**-23
# Largest relative error of one rounding. To bf16, devices round to nearest and Triton's interpreter cuts off.
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}
Values = dict[str, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(DEVICE, dtype)


class Case:
    """Inputs of all operators, in the dtype of the stream; `exact` is the same numbers in fp64."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, parameter_rows: int | None = None) -> None:
        batch, tokens, heads, self.head_dim = shape
        self.width = heads * self.head_dim
        rows = parameter_rows or batch
        self.x = random(batch, tokens, self.width, seed=1, dtype=dtype) * 3 + 1
        self.y = random(batch, tokens, self.width, seed=2, dtype=dtype)
        self.weight, self.bias, self.gate = (
            random(rows, 1, self.width, seed=seed, dtype=torch.float32) for seed in (3, 4, 5)
        )
        self.norm_weight = random(self.width, seed=6, dtype=dtype)
        angles = random(tokens, self.head_dim // 2, seed=7, dtype=torch.float32) * 3
        self.rotation = angles.cos(), angles.sin()
        self.grad = random(batch, tokens, self.width, seed=8, dtype=dtype)

    def exact(self, name: str) -> Tensor:
        value: Tensor = getattr(self, name)
        return value.double().requires_grad_()


def differentiated(case: Case, names: list[str], function: Callable[..., Tensor]) -> Values:
    """Value and gradients in fp64."""
    inputs = [case.exact(name) for name in names]
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, case.grad.double().view_as(out))
    return {"out": out.detach(), **dict(zip((f"grad {name}" for name in names), gradients, strict=True))}


def layer_norm(case: Case) -> tuple[Values, Values]:
    out, mean, rstd = OPERATORS.layer_norm(case.x, case.weight, case.bias, EPS)
    gradients = OPERATORS.layer_norm_backward(case.grad, case.x, case.weight, mean, rstd)
    names = ["x", "weight", "bias"]
    found = {"out": out, "mean": mean, "rstd": rstd, **dict(zip((f"grad {n}" for n in names), gradients, strict=True))}
    expected = differentiated(case, names, lambda x, weight, bias: reference.modulate(x, bias, weight - 1, EPS))
    exact = case.x.double()
    expected["mean"] = exact.mean(dim=-1, keepdim=True)
    expected["rstd"] = (exact.var(dim=-1, correction=0, keepdim=True) + EPS).rsqrt()
    return found, expected


def gated_residual(case: Case) -> tuple[Values, Values]:
    out = OPERATORS.gated_residual(case.x, case.y, case.gate)
    dy, dgate = OPERATORS.gated_residual_backward(case.grad, case.y, case.gate)
    found = {"out": out, "grad x": case.grad, "grad y": dy, "grad gate": dgate}
    return found, differentiated(case, ["x", "y", "gate"], reference.gated_residual)


def plain_norm(case: Case, rotate: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        heads = reference.rms_norm(x, weight, EPS).unflatten(-1, (-1, case.head_dim))
        return reference.apply_rope(heads, *(table.double() for table in case.rotation)) if rotate else heads

    return function


def rms_norm(case: Case, rotate: bool) -> tuple[Values, Values]:
    rotation = case.rotation if rotate else None
    norm = HeadNorm(case.head_dim, EPS, case.width)
    out, rstd = OPERATORS.rms_norm_rope(case.x, case.norm_weight, rotation, norm)
    grad = case.grad.unflatten(-1, out.shape[2:])
    dx, dweight = OPERATORS.rms_norm_rope_backward(grad, case.x, case.norm_weight, rotation, rstd, norm)
    found = {"out": out, "rstd": rstd, "grad x": dx, "grad norm_weight": dweight}
    expected = differentiated(case, ["x", "norm_weight"], plain_norm(case, rotate))
    expected["rstd"] = (case.x.double().square().mean(dim=-1, keepdim=True) + EPS).rsqrt()
    return found, expected


CASES: dict[str, Callable[[Case], tuple[Values, Values]]] = {
    "layer norm": layer_norm,
    "gate": gated_residual,
    "norm and rope": lambda case: rms_norm(case, rotate=True),
    "norm": lambda case: rms_norm(case, rotate=False),
}


def errors(found: Values, expected: Values) -> dict[str, float]:
    """The largest error of each value over its largest number."""
    assert found.keys() == expected.keys()
    assert {name: value.shape for name, value in found.items()} == {n: value.shape for n, value in expected.items()}
    return {
        name: float((found[name].double() - value).abs().max() / value.abs().max()) for name, value in expected.items()
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_fp32_is_exact_to_a_few_units_in_the_last_place(name: str, shape: tuple[int, int, int, int]) -> None:
    found, expected = CASES[name](Case(shape, torch.float32))
    assert {value.dtype for value in found.values()} == {torch.float32}
    worst = errors(found, expected)
    assert max(worst.values()) <= 4 * FP32_ULP, worst


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_narrow_stream_is_rounded_once(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """It gives the number next to the exact result in its dtype; statistics and fp32 parameters stay fp32."""
    case = Case(shape, dtype)
    found, expected = CASES[name](case)
    worst = errors(found, expected)
    for key, value in found.items():
        input_ = getattr(case, key.removeprefix("grad "), None)  # a gradient's; other values are in the stream's dtype
        statistic = key in ("mean", "rstd")
        assert value.dtype == (torch.float32 if statistic else dtype if input_ is None else input_.dtype)
        assert worst[key] <= ROUNDING.get(value.dtype, 0) + 4 * FP32_ULP, worst
    assert ((found["out"].double() - expected["out"]).abs() <= ROUNDING[dtype] * expected["out"].abs() + 1e-5).all()


@pytest.mark.parametrize("name", ["layer norm", "gate"])
def test_one_row_of_parameters_serves_all_batch_elements(name: str) -> None:
    found, expected = CASES[name](Case((2, 37, 3, 16), torch.float32, parameter_rows=1))
    assert max(errors(found, expected).values()) <= 4 * FP32_ULP


@pytest.mark.parametrize("rotate", [True, False])
def test_two_ranks_with_half_of_the_heads_each(rotate: bool) -> None:
    """Each gives its sums over columns to the other; together they are the norm over all heads."""
    case = Case((2, 19, 4, 16), torch.float32)
    rotation = case.rotation if rotate else None
    halves = [slice(0, case.width // 2), slice(case.width // 2, None)]
    given: list[Tensor] = []

    def exchange(sums: Tensor) -> Tensor:
        given.append(sums)
        return sums + (given[-2] if len(given) % 2 == 0 else 0)

    def both(call: Callable[[slice, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
        """One rank after the other; the first, which has nothing of the second yet, once more at the end."""
        given.clear()
        call(halves[0], exchange)
        second = call(halves[1], exchange)
        return [call(halves[0], lambda sums: sums + given[1]), second]

    def forward(half: slice, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        norm = HeadNorm(case.head_dim, EPS, case.width, sum_over_ranks)
        return OPERATORS.rms_norm_rope(case.x[..., half], case.norm_weight[half], rotation, norm)

    (first, rstd), (second, same_rstd) = both(forward)
    assert torch.equal(rstd, same_rstd)

    def backward(half: slice, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        heads = case.grad[..., half].unflatten(-1, (-1, case.head_dim))
        norm = HeadNorm(case.head_dim, EPS, case.width, sum_over_ranks)
        return OPERATORS.rms_norm_rope_backward(heads, case.x[..., half], case.norm_weight[half], rotation, rstd, norm)

    gradients = [torch.cat(parts, dim=-1) for parts in zip(*both(backward), strict=True)]
    found = {"out": torch.cat([first, second], dim=2), "grad x": gradients[0], "grad norm_weight": gradients[1]}
    expected = differentiated(case, ["x", "norm_weight"], plain_norm(case, rotate))
    assert max(errors(found, expected).values()) <= 4 * FP32_ULP


def test_strides_do_not_matter() -> None:
    """Parameters that are rows of a larger table, as a block's modulation is, and streams whose columns are apart."""
    case = Case((2, 6, 3, 16), torch.float32)
    contiguous = [layer_norm(case)[0], gated_residual(case)[0], rms_norm(case, rotate=True)[0]]
    table = torch.stack((case.weight, case.bias, case.gate), dim=2).squeeze(1)  # [B, 3, D]
    case.weight, case.bias, case.gate = table.unsqueeze(1).unbind(2)
    case.x, case.y, case.grad = (value.mT.contiguous().mT for value in (case.x, case.y, case.grad))
    assert not any(value.is_contiguous() for value in (case.weight, case.bias, case.gate, case.x, case.y, case.grad))
    strided = [layer_norm(case)[0], gated_residual(case)[0], rms_norm(case, rotate=True)[0]]
    for a, b in zip(contiguous, strided, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shape", [(1, 2, 3, 16), (1, 1, 1, 8200), (1, 0, 3, 16)], ids=["fp64", "wide rows", "no rows"])
def test_the_plain_operators_take_the_rest(shape: tuple[int, int, int, int]) -> None:
    case = Case(shape, torch.float64)
    dtype = torch.float64 if shape[1] == 2 else torch.float32
    x, grad, weight, norm_weight = (v.to(dtype) for v in (case.x, case.grad, case.weight, case.norm_weight))

    def results(operators: Operators) -> list[Tensor]:
        out, mean, rstd = operators.layer_norm(x, weight, weight, EPS)
        norm = HeadNorm(case.head_dim, EPS, case.width)
        heads = operators.rms_norm_rope(x, norm_weight, case.rotation, norm)
        gradients = operators.rms_norm_rope_backward(
            grad.view_as(heads[0]), x, norm_weight, case.rotation, heads[1], norm
        )
        return [
            *(out, mean, rstd, *operators.layer_norm_backward(grad, x, weight, mean, rstd)),
            *(operators.gated_residual(x, grad, weight), *operators.gated_residual_backward(grad, x, weight)),
            *(*heads, *gradients),
        ]

    for found, expected in zip(results(OPERATORS), results(Operators()), strict=True):
        assert torch.equal(found, expected)


def test_the_device_of_a_tensor_decides() -> None:
    assert type(operators_of(torch.zeros(1))) is Operators
    with FakeTensorMode():  # a fake tensor on a device that is not here
        assert type(operators_of(torch.empty(1, device="cuda"))) is Operators
    if DEVICE == "cuda":
        assert isinstance(operators_of(torch.zeros(1, device=DEVICE)), TritonOperators)


def test_triton_is_tried_before_it_is_used() -> None:
    choice = with_triton(torch.device(DEVICE), 2)
    assert (choice.operators, choice.name, choice.instead) == (TritonOperators(2), "Triton's", None)


@pytest.mark.skipif(DEVICE != "cpu", reason="Triton finds a device here")
def test_torchs_functions_take_the_place_of_a_triton_that_cannot_start() -> None:
    """Outside its interpreter Triton really fails on a machine without a device, as it does without a C compiler."""
    code = (
        "import torch; from mm.ops.elementwise.dispatch import with_triton; "
        "choice = with_triton(torch.device('cpu'), 2); "
        "print(type(choice.operators).__name__, '|', choice.name, '|', choice.instead)"
    )
    operators, name, instead = in_another_process("-c", code).strip().split(" | ")
    assert (operators, name) == ("Operators", "torch's")
    assert instead.startswith("a Triton kernel does not start (RuntimeError: ")


def test_triton_is_imported_only_for_a_tensor_that_needs_it() -> None:
    code = "import sys, torch; from mm.ops.elementwise.dispatch import operators_of; operators_of(torch.zeros(1)); "
    found = in_another_process("-c", code + "print('triton' in sys.modules)")
    assert found.strip() == "False"


@pytest.mark.nightly
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """By Triton's compiler, without a device: values stay in registers, streams move 16 bytes at a time, bf16 is
    rounded to nearest, and registers and shared memory are such that a multiprocessor can start the program."""
    output = in_another_process(str(Path(__file__).with_name("compiled_kernels.py")), "1536", "5120", cache=tmp_path)
    compiled = json.loads(output)
    assert len(compiled) == 2 * 10
    for name, kernel in compiled.items():
        ptx = kernel.pop("ptx")
        assert kernel["local"] == 0, (name, kernel)
        assert kernel["registers"] * kernel["threads"] <= 64 * 1024, (name, kernel)
        assert kernel["shared"] <= 99 * 1024, (name, kernel)
        assert not re.search(r"(ld|st)\.global\S*\.b16 ", ptx), name
        if "sum_of_squares" not in name and "dot" not in name:
            assert "st.global.v4.b32" in ptx, name
            assert set(re.findall(r"cvt\.\w+\.bf16x?2?\.f32", ptx)) == {"cvt.rn.bf16x2.f32"}, name


def in_another_process(*arguments: str, cache: Path | None = None) -> str:
    """What Python prints there, with Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300).stdout
