"""Weights in eight bits: how far results are from unquantised ones, what is stored, and what is kept for backward."""

import pytest
import torch
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.lora.layer import Adapted, LoRALinear, keep_in_low_bits
from mm.lora.low_bit import STORED, LowBit, LowBitLinear, quantise
from mm.lora.targets import linears_of
from mm.parallel.placement import whole_shapes
from mm.rng import generator
from mm.wan.initial import initial_value
from mm.wan.model import WanModel

KINDS: list[LowBit] = ["int8", "fp8"]
ERRORS = {"int8": 0.008, "fp8": 0.027}
"""Of a linear with normal weights. int8: rows of 1,536 have their largest at 3.4 sigma, so steps of 3.4/127 sigma, and
rounding is uniform: 3.4 / 127 / sqrt(12) = 0.8 %. e4m3: steps of 1/8 to 1/16 of a value, evenly in between: 2.6 %."""


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def low_bit_linear(weight: Tensor, bias: Tensor, kind: LowBit) -> LowBitLinear:
    with torch.device("meta"):
        layer = LowBitLinear(nn.Linear(weight.shape[1], weight.shape[0]), kind)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        stored, scale = quantise(weight, kind)
        layer.weight.copy_(stored)
        layer.weight_scale.copy_(scale)
        layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_a_linear_and_of_its_gradient(kind: LowBit, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(512, 1536, generator=random)
    x = torch.randn(64, 1536, generator=random)
    grad = torch.randn(64, 512, generator=random)
    layer = low_bit_linear(weight, torch.zeros(512), kind)
    layer.bias.data = layer.bias.data.to(dtype)
    given = x.to(dtype).requires_grad_()
    found = layer(given)
    found.backward(grad.to(dtype))
    assert found.dtype == given.grad.dtype == dtype
    assert relative(found, x.double() @ weight.double().T) == pytest.approx(ERRORS[kind], rel=0.15)
    assert relative(given.grad, grad.double() @ weight.double()) == pytest.approx(ERRORS[kind], rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_stored_weight(kind: LowBit) -> None:
    random = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(24, 40, generator=random), torch.randn(24, generator=random)
    weight[3] = 0
    stored, scale = quantise(weight, kind)
    assert stored.dtype == STORED[kind] and torch.equal(scale, scale.bfloat16().float())
    exact = stored.double() * scale.double().unsqueeze(1)
    x = torch.randn(5, 40, generator=random)
    given, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    layer = low_bit_linear(weight, bias, kind)
    grad = torch.randn(5, 24, generator=random)
    layer(given).backward(grad)
    (theirs @ exact.T + bias.double()).backward(grad.double())
    assert relative(layer(x), theirs.detach() @ exact.T + bias.double()) <= 1e-6
    assert relative(given.grad, theirs.grad) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_nothing_but_what_is_stored(kind: LowBit) -> None:
    layer = LoRALinear(low_bit_linear(torch.randn(48, 32), torch.zeros(48), kind), Adapted(4, 4.0))
    x = torch.randn(64, 32, requires_grad=True)
    saved: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        saved.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = layer(x)
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
    others = [value for value in saved if value.untyped_storage().data_ptr() not in own]
    assert {tuple(value.shape) for value in others} <= {(64, 4)}  # A x
    assert out.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_a_model(kind: LowBit) -> None:
    config = WanConfig(text_dim=16, hidden_size=96, ffn_dim=192, num_heads=4, num_layers=2, freq_dim=16)
    with torch.device("meta"):
        model = WanModel(config).to_precision(torch.bfloat16)
    linears = linears_of(whole_shapes(config))
    before = sum(p.nbytes for p in model.parameters())
    keep_in_low_bits(model, linears, kind)
    saved = before - sum(p.nbytes for p in model.parameters())
    assert saved == sum(rows * columns - 4 * rows for rows, columns in linears.values())
    assert {p.dtype for n, p in model.named_parameters() if n.removesuffix(".weight") in linears} == {STORED[kind]}


VELOCITY = {"int8": 0.0094, "fp8": 0.036}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_velocity(kind: LowBit) -> None:
    """A model of the 1.3B's proportions, six blocks deep.

    Its linears are normal, which is harder than Wan's uniform initial weights, and its gates of size one, so that what
    blocks add outweighs their input.
    """
    config = WanConfig(text_dim=64, text_len=16, hidden_size=384, ffn_dim=2240, num_heads=6, num_layers=6, freq_dim=64)

    def value_of(name: str, shape: tuple[int, ...]) -> Tensor:
        value = initial_value(name, shape, 1)
        random = generator(1, "init_weights", name, 0)
        if name.endswith("modulation"):
            return value * shape[-1] ** 0.5
        if name.endswith("weight") and len(shape) == 2:
            return torch.randn(*shape, generator=random) / shape[1] ** 0.5
        return value

    plain = WanModel(config)
    with torch.device("meta"):
        low = WanModel(config)
    keep_in_low_bits(low, linears_of(whole_shapes(config)), kind)
    low.to_empty(device="cpu")
    shapes = whole_shapes(config)
    for name, parameter in plain.named_parameters():
        parameter.copy_(value_of(name, shapes[name]))
    for name, parameter in low.named_parameters():
        module, _, part = name.rpartition(".")
        quantised = f"{module}.weight_scale" in dict(low.named_parameters()) and part != "bias"
        if quantised:
            parameter.copy_(quantise(value_of(f"{module}.weight", shapes[f"{module}.weight"]), kind)[part != "weight"])
        else:
            parameter.copy_(value_of(name, shapes[name]))
    random = torch.Generator().manual_seed(3)
    inputs = (
        torch.randn(1, 16, 2, 16, 16, generator=random), torch.tensor([637.0]),
        torch.randn(1, 16, 64, generator=random),
    )  # fmt: skip
    error = relative(low.velocity(*inputs), plain.velocity(*inputs))
    assert error == pytest.approx(VELOCITY[kind], rel=0.1)
