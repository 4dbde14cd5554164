"""References and tables against independent formulas, initial weights, precision, and what may be replaced."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import nn

from mm.config.model import WanConfig
from mm.errors import ConfigError
from mm.ops.attention.segments import Segments
from mm.ops.elementwise import reference
from mm.wan import rope
from mm.wan.initial import initial_value
from mm.wan.inputs import ModelInputs
from mm.wan.layers import ModuleFactories, QKNorm
from mm.wan.model import WanModel
from mm.wan.patches import patchify, token_grid, unpatchify
from mm.wan.rope import RotaryTables, axis_widths, rope_tables
from mm.wan.sinusoid import timestep_sinusoid

CONFIG = WanConfig(text_dim=32, hidden_size=64, ffn_dim=96, num_heads=4, num_layers=2, freq_dim=32)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("head_dim", "widths"), [(128, (44, 42, 42)), (32, (12, 10, 10)), (4, (4, 0, 0))])
def test_rope_tables_are_those_of_diffusers(head_dim, widths):
    assert axis_widths(head_dim) == widths
    cos, sin = rope_tables((21, 5, 7), head_dim)
    expected_cos, expected_sin = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)(torch.empty(1, 16, 21, 10, 14))
    assert cos.shape == sin.shape == (21 * 5 * 7, head_dim // 2)
    assert cos.dtype == torch.float32
    assert torch.equal(cos, expected_cos[0, :, 0, 0::2])
    assert torch.equal(sin, expected_sin[0, :, 0, 0::2])


def test_rope_is_a_complex_rotation_and_keeps_the_dtype():
    x = torch.randn(2, 12, 3, 16)
    cos, sin = rope_tables((2, 2, 3), 16)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)[:, None]
    assert torch.allclose(reference.apply_rope(x, cos, sin).double(), torch.view_as_real(turned).flatten(-2), atol=1e-6)
    assert reference.apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_attention_is_the_softmax_formula():
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    weights = torch.einsum("btnk,bsnk->bnts", q, k).div(math.sqrt(8)).softmax(-1)
    assert torch.allclose(reference.attention(q, k, v), torch.einsum("bnts,bsnk->btnk", weights, v), atol=1e-6)


def test_norms_and_gates_use_fp32_statistics_for_bf16_streams():
    """Computed in fp64 from the same bf16 numbers, the result differs by the last rounding to bf16 only."""
    x = (torch.randn(2, 5, 64) * 30 + 100).bfloat16()  # a large mean ruins a variance taken in bf16
    y, wide = torch.randn(2, 5, 64).bfloat16(), x.double()
    shift, scale, weight = torch.randn(2, 1, 64), torch.randn(2, 1, 64), torch.randn(64)
    centred = wide - wide.mean(-1, keepdim=True)
    modulated = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    for value, exact in (
        (reference.modulate(x, shift, scale, 1e-6), modulated),
        (reference.rms_norm(x, weight, 1e-6), normed),
        (reference.gated_residual(x, y, shift), wide + y.double() * shift),
    ):
        assert value.dtype == torch.bfloat16
        assert torch.allclose(value.double(), exact, rtol=2**-8, atol=1e-5)


def test_timestep_sinusoid_is_exact_at_the_far_end():
    value = timestep_sinusoid(torch.tensor([999.5]), 256)[0]
    angles = [999.5 * 10_000 ** (-i / 128) for i in range(128)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert torch.allclose(value, torch.tensor(expected), atol=2e-7)


def test_patchify_is_undone_and_has_the_channel_fastest():
    latents = torch.randn(2, 3, 4, 6, 8)
    tokens = patchify(latents, (1, 2, 2))
    assert torch.equal(unpatchify(tokens, (4, 3, 4), (1, 2, 2)), latents)
    # Token (frame 1, row 2, column 3), inner place (row 1, column 0), channel 2.
    assert tokens[1, 1 * 12 + 2 * 4 + 3, (1 * 2 + 0) * 3 + 2] == latents[1, 2, 1, 5, 6]


@pytest.mark.parametrize("size", [(3, 7, 8), (3, 8, 7), (0, 8, 8)])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(ConfigError) as caught:
        token_grid(size, (1, 2, 2))
    assert caught.value.id == "CFG-040"


@pytest.mark.parametrize(
    ("latents", "timestep", "text", "id"),
    [
        ((1, 16, 3, 7, 8), (1,), (1, 5, 32), "CFG-040"),
        ((1, 8, 3, 8, 8), (1,), (1, 5, 32), "CFG-041"),
        ((16, 3, 8, 8), (1,), (1, 5, 32), "CFG-041"),
        ((1, 16, 3, 8, 8), (1,), (1, 5, 31), "CFG-042"),
        ((2, 16, 3, 8, 8), (2,), (1, 5, 32), "CFG-042"),
        ((1, 16, 3, 8, 8), (1,), (1, 0, 32), "CFG-042"),
        ((2, 16, 3, 8, 8), (1,), (2, 5, 32), "CFG-043"),
        ((1, 16, 3, 8, 8), (), (1, 5, 32), "CFG-043"),
    ],
)
def test_inputs_of_wrong_shape_are_refused(latents, timestep, text, id):
    with pytest.raises(ConfigError) as caught:
        WanModel(CONFIG).velocity(torch.zeros(latents), torch.zeros(timestep), torch.zeros(text))
    assert caught.value.id == id


def test_initial_weights_follow_the_rules_of_wan():
    values = {name: initial_value(name, tuple(p.shape), 7) for name, p in WanModel(CONFIG).named_parameters()}
    q, patch = values["blocks.0.self_attn.q.weight"], values["patch_embedding.weight"]
    for weight, bound in ((q, math.sqrt(6 / 128)), (patch, math.sqrt(6 / (64 + 16 * 4)))):
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for name in ("text_embedding.0.weight", "text_embedding.2.weight", "time_embedding.2.weight"):
        assert values[name].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["time_projection.1.weight"].abs().max() <= math.sqrt(6 / (64 + 384))
    assert values["blocks.1.modulation"].std().item() == pytest.approx(1 / 8, rel=0.1)
    assert not values["head.head.weight"].any()
    assert not any(value.any() for name, value in values.items() if name.endswith("bias"))
    assert all((value == 1).all() for name, value in values.items() if "norm" in name and name.endswith("weight"))


def test_initial_weights_depend_on_seed_and_name_not_on_layout_or_global_state():
    whole, stage = WanModel(CONFIG), WanModel(CONFIG)
    del stage.blocks["0"]
    whole.init_weights(7)
    torch.manual_seed(99)
    stage.init_weights(7)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in stage.state_dict().items())
    name, shape = "blocks.0.self_attn.q.weight", (64, 64)
    drawn = [initial_value(n, shape, s) for n, s in ((name, 7), (name, 8), (name.replace("0", "1"), 7))]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_pieces_that_stay_fp32_are_computed_in_fp32_even_from_bf16_parameters():
    """A model cast as a whole still runs; only the rounding of its parameters is lost, not the fp32 arithmetic."""
    model = WanModel(CONFIG)
    model.init_weights(7)
    nn.init.normal_(model.head.head.weight, std=0.02)
    inputs = (torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32))
    with torch.no_grad():
        exact = model.velocity(*inputs)
        model.to(torch.bfloat16)
        hidden = model.patch_embedding(patchify(inputs[0], (1, 2, 2)))
        conditions = model.embed_conditions(ModelInputs(*inputs))
        assert (hidden.dtype, conditions.context.dtype) == (torch.bfloat16, torch.bfloat16)
        assert (conditions.time.dtype, conditions.time_modulation.dtype) == (torch.float32, torch.float32)
        value = model.velocity(*inputs)
    assert value.dtype == torch.float32
    assert (value - exact).norm() / exact.norm() < 2e-2


def test_parts_may_shard_heads_and_replace_attention():
    """Half-width column and row layers give half the heads to the attention that was handed in."""
    seen = []

    def attention(q, k, v, segments=None, keep=None):
        assert segments in (None, Segments.whole([8]))
        seen.append((q.shape, k.shape))
        return reference.attention(q, k, v)

    parts = ModuleFactories(
        column=lambda fan_in, fan_out: nn.Linear(fan_in, fan_out // 2),
        row=lambda fan_in, fan_out: nn.Linear(fan_in // 2, fan_out),
        qk_norm=lambda width, head_dim, eps: QKNorm(width // 2, head_dim, eps),
        self_attention=attention,
        cross_attention=attention,
    )
    model = WanModel(CONFIG, parts)
    out = model.velocity(torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 5, 32))
    assert out.shape == (1, 16, 2, 4, 4)
    assert seen == [((1, 8, 2, 16), (1, 8, 2, 16)), ((1, 8, 2, 16), (1, 5, 2, 16))] * CONFIG.num_layers
    assert model.state_dict().keys() == WanModel(CONFIG).state_dict().keys()


def test_the_angles_of_a_grid_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = [(frames, 3, 4) for frames in range(1, 101)]
    kept, host = RotaryTables(16), torch.device("cpu")
    for grid in grids:
        pairs = zip(kept.tables(grid, host), rope_tables(grid, 16), strict=True)
        assert all(torch.equal(table, expected) for table, expected in pairs)
    computed = []
    angles = rope._axis_angles
    monkeypatch.setattr(rope, "_axis_angles", lambda *args: computed.append(args) or angles(*args))
    first = rope_tables(grids[-1], 16)
    computed.clear()
    again = kept.positions([grids[-1]], host)
    assert computed == [] and torch.equal(again.cos, first[0]) and torch.equal(again.sin, first[1])
    kept.tables(grids[0], host)  # so many grids are not all kept
    assert len(computed) == 3
