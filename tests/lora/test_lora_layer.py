"""The adapted linear against the same linear with merged weights in fp64, and what it keeps for its backward."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.lora.layer import (
    Adapted,
    LoRALinear,
    adapter_shapes,
    add_adapters,
    init_adapters,
    initial_adapter_value,
)
from mm.lora.targets import linears_of
from mm.wan.model import WanModel

TINY = WanConfig(text_dim=16, hidden_size=24, ffn_dim=40, num_heads=2, num_layers=2, freq_dim=16)


def random_layer(alpha: float = 12.0) -> LoRALinear:
    layer = LoRALinear(nn.Linear(7, 5).double(), Adapted(3, alpha)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return layer


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7)])
def test_forward_is_that_of_merged_weights(shape):
    layer = random_layer()
    x = torch.randn(*shape, dtype=torch.float64)
    merged = layer.weight + 12.0 / 3 * layer.lora_B @ layer.lora_A
    assert (layer(x) - (x @ merged.T + layer.bias)).abs().max() <= 1e-12


def test_gradients_and_which_parameters_have_them():
    layer = random_layer()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.lora_A, layer.lora_B))
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_a_new_adapter_changes_no_bit_of_a_bf16_model():
    model = WanModel(TINY)
    model.init_weights(1)
    nn.init.normal_(model.head.head.weight)  # zero in a new model, which would hide everything
    model.to_precision(torch.bfloat16)
    inputs = (torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 16))
    before = model.velocity(*inputs)
    names = [f"blocks.{i}.{linear}" for i in (0, 1) for linear in ("self_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]
    adapted = dict.fromkeys(names, Adapted(4, 8.0))
    add_adapters(model, adapted)
    init_adapters(model, 1)
    assert torch.equal(model.velocity(*inputs), before)
    shapes = {name: tuple(p.shape) for name, p in WanModel(TINY).named_parameters()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {f"{name}.{half}" for name in names for half in ("lora_A", "lora_B")}
    assert {name: tuple(p.shape) for name, p in trainable.items()} == adapter_shapes(linears_of(shapes), adapted)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    model.velocity(*inputs).sum().backward()
    assert all((p.grad != 0).any() == name.endswith("lora_B") for name, p in trainable.items())  # B is zero


def test_a_model_keeps_its_names_and_a_stage_gets_the_adapters_of_its_blocks():
    model = WanModel(TINY)
    names = {name for name, _ in model.named_parameters()}
    del model.blocks["0"]
    adapted = {f"blocks.{i}.self_attn.k": Adapted(2, 2.0) for i in (0, 1)}
    with torch.device("meta"):
        added = add_adapters(model, adapted)
    assert added == ["blocks.1.self_attn.k.lora_A", "blocks.1.self_attn.k.lora_B"]
    after = {name for name, _ in model.named_parameters()}
    assert after == {name for name in names if not name.startswith("blocks.0.")} | set(added)
    with pytest.raises(AttributeError):
        add_adapters(model, {"blocks.1.self_attn.typo": Adapted(2, 2.0)})


def kept(run, but: set[int]) -> list[Tensor]:
    """Different storages that autograd saves, without those of `but`."""
    storages: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        storages.setdefault(value.untyped_storage().data_ptr(), value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        alive = run()
    del alive
    return [value for pointer, value in storages.items() if pointer not in but]


def test_three_linears_of_one_input_keep_it_once_and_what_has_width_r():
    tokens, width, rank = 64, 48, 4
    layers = [LoRALinear(nn.Linear(width, width).bfloat16(), Adapted(rank, 1.0)) for _ in range(3)]
    own = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    x = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    found = [value for value in kept(lambda: [layer(x) for layer in layers], own) if tokens in value.shape]
    assert sorted(value.untyped_storage().nbytes() for value in found) == [2 * tokens * rank] * 3 + [2 * tokens * width]


def test_a_frozen_linear_keeps_nothing_of_its_input():
    base = nn.Linear(48, 48).bfloat16().requires_grad_(False)
    x = torch.randn(1, 64, 48, dtype=torch.bfloat16, requires_grad=True)
    assert kept(lambda: base(x), {p.untyped_storage().data_ptr() for p in base.parameters()}) == []


def test_initial_values_are_distributed_as_pefts():
    shape = (64, 512)
    a = initial_adapter_value("blocks.0.self_attn.q.lora_A", shape, 7)
    again = initial_adapter_value("blocks.0.self_attn.q.lora_A", shape, 7)
    other = initial_adapter_value("blocks.1.self_attn.q.lora_A", shape, 7)
    assert torch.equal(a, again) and not torch.equal(a, other)
    assert not initial_adapter_value("blocks.0.self_attn.q.lora_B", (512, 64), 7).any()

    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=64, target_modules=["0"]), nn.Sequential(nn.Linear(512, 512)))
    theirs = model[0].lora_A["default"].weight
    bound = 1 / math.sqrt(512)  # uniform within it, so its standard deviation is bound / sqrt(3)
    for value in (a, theirs):
        assert value.abs().max() <= bound
        assert value.abs().max() >= 0.999 * bound
        assert abs(value.std() / (bound / math.sqrt(3)) - 1) < 0.01
        assert abs(value.mean()) < 0.02 * bound
