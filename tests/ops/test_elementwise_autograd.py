"""The operators that save little, against the plain references that autograd differentiates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mm.ops.elementwise import autograd, reference
from mm.ops.elementwise.operators import HeadNorm
from mm.wan.rope import rope_tables

B, T, HEADS, HEAD_DIM, EPS = 2, 12, 3, 16, 1e-6
WIDTH = HEADS * HEAD_DIM


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, sin = rope_tables((1, 3, 4), HEAD_DIM)
    return cos.to(dtype), sin.to(dtype)


def plain_norm_rope(x: Tensor, weight: Tensor, rotation: Any) -> Tensor:
    heads = reference.rms_norm(x, weight, EPS).unflatten(-1, (-1, HEAD_DIM))
    return heads if rotation is None else reference.apply_rope(heads, *rotation)


def own_norm_rope(x: Tensor, weight: Tensor, rotation: Any) -> Tensor:
    return autograd.rms_norm_rope(x, weight, rotation, HeadNorm(HEAD_DIM, EPS, WIDTH))


def arguments(name: str, dtype: torch.dtype, wide: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """(what gradients are taken of, the rest)."""
    x, y = random(B, T, WIDTH, seed=1, dtype=dtype) * 3 + 1, random(B, T, WIDTH, seed=2, dtype=dtype)
    if name == "gate":
        return [x, y, random(B, 1, WIDTH, seed=3, dtype=wide)], []
    if name in ("rope", "no rope"):
        return [x, random(WIDTH, seed=3, dtype=dtype)], [tables(wide) if name == "rope" else None]
    rows = B if name == "modulate" else 1
    return [x, random(rows, 1, WIDTH, seed=3, dtype=wide), random(rows, 1, WIDTH, seed=4, dtype=wide)], [EPS]


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return reference.modulate(x, bias, weight - 1, eps)


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "modulate": (autograd.layer_norm, plain_layer_norm),
    "norm": (autograd.layer_norm, plain_layer_norm),
    "gate": (autograd.gated_residual, reference.gated_residual),
    "rope": (own_norm_rope, plain_norm_rope),
    "no rope": (own_norm_rope, plain_norm_rope),
}


def value_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor], rest: list[Any]) -> list[Tensor]:
    inputs = [value.detach().requires_grad_() for value in inputs]
    out = function(*inputs, *rest)
    out.backward(random(*out.shape, seed=9, dtype=torch.bfloat16).to(out.dtype))  # a number that every dtype has
    return [out.detach(), *(value.grad for value in inputs if value.grad is not None)]


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_the_reference(name: str) -> None:
    function, reference = PAIRS[name]
    inputs, rest = arguments(name, torch.float64, torch.float64)
    found, expected = (value_and_gradients(f, inputs, rest) for f in (function, reference))
    assert len(found) == len(expected) == 1 + len(inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs, rest = arguments(name, torch.float64, torch.float64)
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(lambda *values: PAIRS[name][0](*values, *rest), inputs)


@pytest.mark.parametrize("name", PAIRS)
def test_bf16_is_rounded_once(name: str) -> None:
    """A bf16 stream gives the bf16 number next to the exact result; gradients have the dtypes of their inputs."""
    inputs, rest = arguments(name, torch.bfloat16, torch.float32)
    exact_rest = [tuple(x.double() for x in value) if isinstance(value, tuple) else value for value in rest]
    found = value_and_gradients(PAIRS[name][0], inputs, rest)
    exact = value_and_gradients(PAIRS[name][1], [value.double() for value in inputs], exact_rest)
    assert [a.dtype for a in found] == [torch.bfloat16, *(value.dtype for value in inputs)]
    for a, b in zip(found, exact, strict=True):
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()
    assert ((found[0].double() - exact[0]).abs() <= 2**-8 * exact[0].abs() + 1e-5).all()


@pytest.mark.parametrize(
    ("name", "bytes_a_token"), [("modulate", 2 * WIDTH + 8), ("gate", 2 * WIDTH), ("rope", 2 * WIDTH + 4)]
)
def test_what_is_kept(name: str, bytes_a_token: int) -> None:
    """Bytes of storages that grow with the tokens, by unique storage; the rotation tables are shared by all blocks."""
    inputs, rest = arguments(name, torch.bfloat16, torch.float32)
    inputs = [value.requires_grad_() for value in inputs]
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.shape[:2] == (B, T):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        out = PAIRS[name][0](*inputs, *rest)
    assert out.requires_grad
    assert sum(kept.values()) == B * T * bytes_a_token
