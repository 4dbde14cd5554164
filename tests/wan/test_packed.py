"""Samples in one sequence against diffusers' transformer, which gets each of them alone; bad inputs."""

import pytest
import torch
from published_names import diffusers_to_native
from test_wan_parity import ODD_HEADS, TINY, ours_for, reference_for, relative_error

from mm.config.model import WanConfig
from mm.errors import ConfigError
from mm.wan.inputs import ModelInputs, PackedInputs
from mm.wan.model import WanModel

SIZES = {"tiny": [(3, 8, 8), (1, 4, 4), (2, 2, 6)], "odd-heads": [(2, 6, 5), (4, 2, 3)]}
TIMESTEPS, TEXT_LENGTHS = (999.0, 37.5, 500.0), (9, 2, 5)


def samples_of(config: WanConfig, sizes: list[tuple[int, int, int]]) -> tuple[ModelInputs, ...]:
    torch.manual_seed(1)
    return tuple(
        ModelInputs(
            torch.randn(1, config.in_dim, *size), torch.tensor([timestep]), torch.randn(1, length, config.text_dim)
        )
        for size, timestep, length in zip(sizes, TIMESTEPS, TEXT_LENGTHS, strict=False)
    )


@pytest.mark.parametrize(("config", "name"), [(TINY, "tiny"), (ODD_HEADS, "odd-heads")], ids=SIZES)
def test_each_sample_equals_diffusers_alone(config: WanConfig, name: str) -> None:
    """Velocity of each and every gradient of the mean of their losses."""
    reference = reference_for(config)
    model = ours_for(reference, config)
    samples = samples_of(config, SIZES[name])
    found = model.velocities(PackedInputs(samples))
    expected = [reference(of.latents, of.timestep, of.text, return_dict=False)[0] for of in samples]
    assert [x.shape for x in found] == [x.shape for x in expected]
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5
    for velocities in (found, expected):
        torch.stack([(v - 1).square().mean() for v in velocities]).mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    errors = {n: relative_error(gradients[diffusers_to_native(n)], p.grad) for n, p in reference.named_parameters()}
    assert max(errors.values()) <= 1e-4, max(errors.items(), key=lambda item: item[1])


def test_one_sample_is_the_same_bits() -> None:
    config = TINY.model_copy(update={"num_layers": 2})
    model = WanModel(config)
    model.init_weights(0)
    torch.nn.init.normal_(model.head.head.weight)
    (sample,) = samples_of(config, [(3, 8, 8)])
    assert torch.equal(model.velocities(PackedInputs((sample,)))[0], model(sample))


def test_a_sample_sees_nothing_of_its_neighbours() -> None:
    """Changing all of one sample changes no bit of the others, in value or gradient."""
    config = TINY.model_copy(update={"num_layers": 2})
    model = WanModel(config)
    model.init_weights(0)
    torch.nn.init.normal_(model.head.head.weight)
    samples = samples_of(config, SIZES["tiny"])
    other = samples[1].each(lambda value: value + 3)
    before = model.velocities(PackedInputs(samples))
    after = model.velocities(PackedInputs((samples[0], other, samples[2])))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]
    leaves = [x for of in samples for x in (of.latents.requires_grad_(), of.text.requires_grad_())]
    grads = torch.autograd.grad(model.velocities(PackedInputs(samples))[1].sum(), leaves)
    assert [bool(grad.any()) for grad in grads] == [False, False, True, True, False, False]


@pytest.mark.parametrize("batches", [(), (1, 2)])
def test_a_sequence_is_made_of_single_samples(batches: tuple[int, ...]) -> None:
    samples = tuple(
        ModelInputs(torch.zeros(n, TINY.in_dim, 1, 4, 4), torch.zeros(n), torch.zeros(n, 3, TINY.text_dim))
        for n in batches
    )
    with pytest.raises(ConfigError, match="one sample each") as error:
        PackedInputs(samples).check(TINY)
    assert error.value.id == "CFG-240"
