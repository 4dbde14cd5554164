"""The model against diffusers' WanTransformer3DModel with the same random weights: velocity and every gradient."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from published_names import diffusers_to_native

from mm.config.model import WanConfig
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel
from mm.wan.patches import patchify, unpatchify
from mm.wan.rope import grid_positions

TINY = WanConfig(text_dim=64, hidden_size=128, ffn_dim=512, num_heads=4, num_layers=4, freq_dim=64)
REAL_WIDTH = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=2)
ODD_HEADS = WanConfig(  # a head width that six does not divide, another patch and other channel counts
    in_dim=20, out_dim=8, patch_size=(2, 2, 1), text_dim=24, hidden_size=80, ffn_dim=96, num_heads=2, num_layers=1
)


def reference_for(config: WanConfig) -> WanTransformer3DModel:
    torch.manual_seed(0)
    reference = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    )
    with torch.no_grad():  # fresh norms are ones and a fresh modulation is small: both would hide mistakes
        for name, parameter in reference.named_parameters():
            if "norm" in name or "scale_shift_table" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return reference


def ours_for(reference: WanTransformer3DModel, config: WanConfig) -> WanModel:
    model = WanModel(config)
    model.load_state_dict({diffusers_to_native(n): v.clone() for n, v in reference.state_dict().items()}, strict=True)
    return model


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max().clamp_min(1e-8)).item()


@pytest.mark.parametrize(
    ("config", "size", "timesteps"),
    [
        (TINY, (3, 8, 8), (999.0, 37.5)),
        (TINY, (1, 4, 4), (0.0, 1000.0)),
        (REAL_WIDTH, (2, 4, 6), (871.25, 3.0)),
        (ODD_HEADS, (4, 6, 5), (500.0, 250.0)),
    ],
    ids=["tiny", "tiny-one-frame", "real-width", "odd-heads"],
)
def test_velocity_and_every_gradient_equal_diffusers(config, size, timesteps):
    reference = reference_for(config)
    model = ours_for(reference, config)
    latents = torch.randn(2, config.in_dim, *size)
    text = torch.randn(2, 7, config.text_dim)
    weight = torch.randn(2, config.out_dim, *size)
    inputs = (latents, torch.tensor(timesteps), text)

    expected = reference(*inputs).sample
    velocity = model.velocity(*inputs)
    assert velocity.dtype == torch.float32
    assert relative_error(velocity, expected) <= 1e-5

    (expected * weight).sum().backward()
    (velocity * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    errors = {n: relative_error(gradients.pop(diffusers_to_native(n)), p.grad) for n, p in reference.named_parameters()}
    assert not gradients, "parameters that diffusers does not have"
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])


def test_samples_of_a_batch_are_independent():
    model = ours_for(reference_for(TINY), TINY)
    latents, text = torch.randn(2, 16, 3, 8, 8), torch.randn(2, 7, 64)
    timestep = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        both = model.velocity(latents, timestep, text)
        for sample in range(2):
            one = model.velocity(latents[[sample]], timestep[[sample]], text[[sample]])
            assert relative_error(both[[sample]], one) <= 1e-5


def test_bf16_stays_near_fp32_and_nearer_than_diffusers_bf16():
    reference = reference_for(TINY)
    model = ours_for(reference, TINY)
    inputs = (torch.randn(2, 16, 3, 8, 8), torch.tensor([999.0, 37.5]), torch.randn(2, 7, 64))
    with torch.no_grad():
        exact = model.velocity(*inputs)
        ours = model.to_precision(torch.bfloat16).velocity(*inputs)
        for name, parameter in reference.named_parameters():  # what its from_pretrained does for a bf16 model
            if not set(name.split(".")) & set(reference._keep_in_fp32_modules):
                parameter.data = parameter.data.bfloat16()
        theirs = reference(inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16()).sample.float()
    assert ours.dtype == torch.float32
    assert relative_error(ours, exact) <= 2e-2
    assert (ours - exact).norm() < (theirs - exact).norm()


def test_pieces_of_a_cut_model_give_the_whole():
    config = TINY
    model = ours_for(reference_for(config), config)
    first, last = ours_for(reference_for(config), config), ours_for(reference_for(config), config)
    for index in "23":
        del first.blocks[index]
    for index in "01":
        del last.blocks[index]
    assert "blocks.2.modulation" in last.state_dict()  # a stage keeps the names of the whole model
    inputs = (torch.randn(1, 16, 3, 8, 8), torch.tensor([700.0]), torch.randn(1, 7, 64))
    with torch.no_grad():
        given = ModelInputs(*inputs)
        hidden = first.patch_embedding(patchify(inputs[0], config.patch_size))
        conditions = first.embed_conditions(given)
        positions = grid_positions((3, 4, 4), config.head_dim)
        streams = first.run_blocks((hidden,), conditions, positions, given)
        (hidden,) = last.run_blocks(streams, conditions, positions, given)
        velocity = unpatchify(last.head(hidden, conditions.time), (3, 4, 4), config.patch_size)
        assert torch.equal(velocity, model.velocity(*inputs))
