"""The flow-matching objective against published values, closed formulas and statistics."""

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from mm.config.base import parse
from mm.config.diffusion import DiffusionConfig
from mm.diffusion.flow import FlowMatching, shift_sigma
from mm.errors import ConfigError
from mm.rng import generator

# (index, timestep, weight) of the reference system's grid, by shift
ORACLE_SHIFT_5 = [
    (0, 1000.0, 0.0),
    (100, 978.261, 0.139075),
    (250, 937.5, 0.397952),
    (500, 833.333, 1.024862),
    (750, 625.0, 1.914043),
    (900, 357.143, 1.865346),
    (999, 4.980, 0.031879),
]


@pytest.mark.parametrize(("index", "timestep", "weight"), ORACLE_SHIFT_5)
def test_shift_5_grid(index, timestep, weight):
    flow = FlowMatching(DiffusionConfig())
    assert len(flow.sigmas) == len(flow.timesteps) == len(flow.weights) == 1000
    assert flow.timesteps[index].item() == pytest.approx(timestep, abs=5e-4)
    assert flow.sigmas[index].item() == pytest.approx(timestep / 1000, abs=5e-7)
    assert flow.weights[index].item() == pytest.approx(weight, abs=5e-7)


def test_shift_5_summary():
    flow = FlowMatching(DiffusionConfig(shift=5.0))
    assert flow.weights.argmax() == 833
    assert flow.weights.max().item() == pytest.approx(2.0764, abs=5e-5)
    assert flow.timesteps[833].item() == pytest.approx(500.6, abs=0.05)
    assert flow.sigmas.mean().item() == pytest.approx(0.74755, abs=5e-6)
    assert flow.weights.double().mean().item() == pytest.approx(1.0, abs=1e-6)
    assert flow.sigmas.dtype == flow.timesteps.dtype == flow.weights.dtype == torch.float32


def test_shift_3_and_1_grids():
    three = FlowMatching(DiffusionConfig(shift=3.0))
    assert three.timesteps[500].item() == pytest.approx(750.0, abs=1e-3)
    assert three.weights[500].item() == pytest.approx(1.260943, abs=5e-7)
    assert three.weights.argmax() == 750
    assert three.weights.max().item() == pytest.approx(1.797838, abs=5e-7)
    one = FlowMatching(DiffusionConfig(shift=1.0))
    assert one.timesteps[500].item() == pytest.approx(500.0, abs=1e-3)
    assert one.weights[500].item() == pytest.approx(1.579605, abs=5e-7)


def test_grid_with_its_last_point():
    flow = FlowMatching(DiffusionConfig(extra_one_step=False, sigma_min=0.001, shift=1.0))
    assert flow.sigmas[0] == 1
    assert flow.sigmas[-1].item() == pytest.approx(0.001, abs=1e-9)
    assert len(flow.sigmas) == 1000


def test_no_weighting_is_one_everywhere():
    flow = FlowMatching(DiffusionConfig(loss_weighting="none"))
    assert torch.equal(flow.weights, torch.ones(1000))
    assert torch.equal(flow.draw_timesteps(0, [1, 2], [0, 0])[2], torch.ones(2))


def test_drawn_indices_are_uniform():
    flow = FlowMatching(DiffusionConfig())
    count, bins = 20_000, 50
    sigma, timestep, weight = flow.draw_timesteps(7, range(count), [0] * count)
    index = torch.searchsorted(-flow.sigmas, -sigma)
    # every draw is a point of the grid, with that point's timestep and weight, to the bit
    assert torch.equal(flow.sigmas[index], sigma)
    assert torch.equal(flow.timesteps[index], timestep)
    assert torch.equal(flow.weights[index], weight)
    observed = torch.bincount(index * bins // 1000, minlength=bins).double()
    expected = count / bins
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert 23.98 < chi_square < 85.35  # the 0.1 % and 99.9 % quantiles of chi-square with 49 degrees of freedom


def test_logit_normal_has_its_median_and_spread():
    flow = FlowMatching(DiffusionConfig(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.8, shift=3.0))
    sigma, timestep, weight = flow.draw_timesteps(3, range(4000), [0] * 4000)
    unshifted = sigma.double() / (3 - 2 * sigma.double())  # the inverse of the shift
    normal = torch.logit(unshifted)
    assert normal.mean().item() == pytest.approx(0.5, abs=4 * 0.8 / math.sqrt(4000))
    assert normal.std().item() == pytest.approx(0.8, abs=4 * 0.8 / math.sqrt(8000))
    assert torch.allclose(timestep, 1000 * sigma)
    bell = torch.exp(-2 * ((flow.timesteps.double() - 500) / 1000) ** 2)
    closed = (torch.exp(-2 * ((timestep.double() - 500) / 1000) ** 2) - bell.min()) / (bell - bell.min()).mean()
    assert torch.allclose(weight.double(), closed, atol=1e-6)
    assert weight.min() >= 0


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_mean_of_the_logits_has_the_other_sign_elsewhere(shift):
    """VideoX-Fun's trainer in diffusers' own functions: an entry of a list that begins at noise."""
    mean, std, count = 0.7, 0.6, 20_000
    drawn = compute_density_for_timestep_sampling(
        "logit_normal", count, logit_mean=mean, logit_std=std, generator=torch.Generator().manual_seed(1)
    )
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift).sigmas[(drawn * 1000).long()]
    config = DiffusionConfig(timestep_sampling="logit_normal", logit_mean=-mean, logit_std=std, shift=shift)
    ours = FlowMatching(config).draw_timesteps(3, range(count), [0] * count)[0]
    for level in (0.1, 0.25, 0.5, 0.75, 0.9):
        # the deviation of a quantile of so many draws is below 0.006; entries are 0.001 to 0.005 apart
        assert ours.quantile(level).item() == pytest.approx(theirs.quantile(level).item(), abs=0.03)
    same_sign = FlowMatching(config.model_copy(update={"logit_mean": mean}))
    assert same_sign.draw_timesteps(3, range(count), [0] * count)[0].median() - theirs.median() > 0.1
    assert ours.median() < shift_sigma(torch.tensor(0.5), shift) - 0.1  # below 0 is towards the data


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29, 1.75])
def test_levels_of_mode_are_those_of_diffusers_for_the_same_uniform_numbers(scale):
    draws, count = [4] * 500, 500
    torch.set_default_dtype(torch.float64)  # they draw numbers of it
    try:
        drawn = [
            compute_density_for_timestep_sampling(
                "mode", 1, mode_scale=scale, generator=generator(3, "timestep", sample, 4)
            )
            for sample in range(count)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    theirs = torch.cat(drawn)
    even = FlowMatching(DiffusionConfig(timestep_sampling="mode", mode_scale=scale, shift=1.0))
    ours = even.draw_timesteps(3, range(count), draws)[0]
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-7)
    shifted = FlowMatching(DiffusionConfig(timestep_sampling="mode", mode_scale=scale, shift=5.0))
    sigma, timestep, weight = shifted.draw_timesteps(3, range(count), draws)
    torch.testing.assert_close(sigma, (5 * theirs / (1 + 4 * theirs)).float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(timestep, 1000 * sigma, rtol=0, atol=1e-4)
    assert weight.min() >= 0


def test_the_scale_of_mode_is_the_paper_s_and_draws_the_middle():
    settings = {"timestep_sampling": "mode", "shift": 1.0}
    usual, said, even = (
        FlowMatching(DiffusionConfig(**settings, **more)).draw_timesteps(3, range(4000), [0] * 4000)[0]
        for more in ({}, {"mode_scale": 1.29}, {"mode_scale": 0.0})
    )
    assert torch.equal(usual, said)
    assert abs(usual.mean().item() - 0.5) < 0.02, "its density is symmetric"
    assert usual.std() < 0.75 * even.std()


def test_a_draw_depends_on_seed_sample_and_draw_alone():
    flow = FlowMatching(DiffusionConfig())
    together = flow.draw_timesteps(1, ["a", "b", "c"], [0, 3, 0])
    alone = flow.draw_timesteps(1, ["b"], [3])
    assert all(torch.equal(many[1:2], one) for many, one in zip(together, alone, strict=True))
    noise = flow.draw_noise(1, ["a", "b", "c"], [0, 3, 0], (2, 3, 4))
    assert noise.shape == (3, 2, 3, 4)
    assert noise.dtype == torch.float32
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(noise[1:2], flow.draw_noise(1, ["b"], [3], (2, 3, 4)))


def test_draws_of_samples_draws_seeds_and_streams_are_independent():
    flow = FlowMatching(DiffusionConfig())
    size = (20_000,)
    rows = torch.cat(
        [
            flow.draw_noise(0, [0, 1, 2], [0, 0, 0], size),
            flow.draw_noise(0, [0], [1], size),
            flow.draw_noise(1, [0], [0], size),
        ]
    )
    correlation = torch.corrcoef(rows) - torch.eye(5)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    assert rows.mean(dim=1).abs().max() < 5 / math.sqrt(20_000)
    assert (rows.std(dim=1) - 1).abs().max() < 5 / math.sqrt(40_000)
    # neighbouring samples and epochs have unrelated timesteps
    first = flow.draw_timesteps(0, range(3000), [0] * 3000)[1]
    second = flow.draw_timesteps(0, range(3000), [1] * 3000)[1]
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 5 / math.sqrt(3000)
    assert torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].abs() < 5 / math.sqrt(3000)


def test_noisy_and_target_are_the_straight_line():
    flow = FlowMatching(DiffusionConfig())
    x0, noise = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    x0, noise = x0.expand(2, 3, 1, 4, 4), noise.expand(2, 3, 1, 4, 4)
    sigma = torch.tensor([0.25, 1.0])
    x = flow.noisy(x0, noise, sigma)
    assert torch.allclose(x[0], 0.75 * x0[0] + 0.25 * noise[0])
    assert torch.equal(x[1], noise[1])
    # following the target from x for -sigma ends at the data
    back = x - sigma.view(2, 1, 1, 1, 1) * flow.target(x0, noise)
    assert torch.allclose(back, x0, atol=1e-6)
    assert flow.noisy(x0.bfloat16(), noise, sigma).dtype == torch.float32


def test_loss_weighs_each_sample():
    flow = FlowMatching(DiffusionConfig())
    target = torch.zeros(2, 1, 2, 2, 2)
    prediction = torch.stack([torch.full((1, 2, 2, 2), 2.0), torch.full((1, 2, 2, 2), 3.0)]).bfloat16()
    prediction.requires_grad_()
    loss, per_sample = flow.loss(prediction, target, torch.tensor([0.5, 2.0]))
    assert per_sample.tolist() == [2.0, 18.0]
    assert loss.item() == 10.0
    assert loss.dtype == torch.float32
    loss.backward()
    # d loss / d prediction = 2 (prediction - target) weight / (elements * batch)
    assert prediction.grad[0, 0, 0, 0, 0].item() == pytest.approx(2 * 2 * 0.5 / 16)
    assert prediction.grad[1, 0, 0, 0, 0].item() == pytest.approx(2 * 3 * 2.0 / 16)


def test_shift_keeps_the_ends():
    ends = shift_sigma(torch.tensor([0.0, 1.0]), 5.0)
    assert ends.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "id"),
    [
        ({"shift": 0}, "CFG-005"),
        ({"num_train_timesteps": 1}, "CFG-005"),
        ({"sigma_min": 1.0}, "CFG-005"),
        ({"timestep_sampling": "uniform"}, "CFG-005"),
        ({"logit_mean": 0.0}, "CFG-005"),
        ({"sigma_max": 1.0}, "CFG-003"),
        ({"mode_scale": 1.29}, "CFG-005"),
        ({"timestep_sampling": "mode", "mode_scale": 1.8}, "CFG-005"),
        ({"timestep_sampling": "mode", "mode_scale": -1.1}, "CFG-005"),
        ({"timestep_sampling": "mode", "timestep_slices": "step"}, "CFG-005"),
        ({"first_frame_share": 1.5}, "CFG-005"),
        ({"band_from": 1.5}, "CFG-005"),
    ],
)
def test_bad_sections_are_refused(values, id):
    with pytest.raises(ConfigError) as caught:
        parse(DiffusionConfig, values, "pretrain_model.json: diffusion")
    assert caught.value.id == id


@pytest.mark.parametrize(
    ("band", "expected"),
    [({"band_from": 0.875}, (0.875, 1.0, 417)), ({"band_below": 0.875}, (0.0, 0.875, 583))],
    ids=["high", "low"],
)
def test_an_expert_s_band_of_the_grid(band, expected):
    """Where DiffSynth-Studio's recipe of Wan2.2 T2V-A14B cuts the grid: 0.417 of it is above 0.875."""
    low, high, count = expected
    flow = FlowMatching(DiffusionConfig(**band))
    sigma, timestep, weight = flow.draw_timesteps(3, range(6000), [0] * 6000)
    assert low <= sigma.min() < sigma.max() <= high
    assert set(sigma.tolist()) <= {level for level in flow.sigmas.tolist() if low <= level <= high}
    assert abs(len(set(sigma.tolist())) - count) <= 2
    assert flow.chance == count / 1000
    whole = FlowMatching(DiffusionConfig())
    same = whole.weight_of(timestep.double()).float()
    torch.testing.assert_close(weight, same, rtol=0, atol=1e-6, msg="weights are those of the whole grid")


@pytest.mark.parametrize("band", [{"band_from": 0.9}, {"band_below": 0.9}, {"band_from": 0.7, "band_below": 0.9}])
@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_sampling": "logit_normal", "logit_mean": 0.3, "logit_std": 1.2, "shift": 3.0},
        {"timestep_sampling": "mode", "mode_scale": 1.6, "shift": 3.0},
    ],
    ids=["logit_normal", "mode"],
)
def test_a_band_of_a_density_is_what_is_left_of_it(settings, band):
    """The distribution inside the band is that of draws without a band that happen to be in it."""
    drawn = FlowMatching(DiffusionConfig(**settings, **band)).draw_timesteps(3, range(8000), [0] * 8000)[0]
    whole = FlowMatching(DiffusionConfig(**settings)).draw_timesteps(3, range(20000), [0] * 20000)[0]
    low, high = DiffusionConfig(**settings, **band).band
    inside = whole[(whole >= low) & (whole < high)]
    assert low <= drawn.min() < drawn.max() < high + 1e-6
    points = torch.linspace(0.1, 0.9, 9)
    torch.testing.assert_close(drawn.quantile(points), inside.quantile(points), rtol=0, atol=0.012)
    chance = FlowMatching(DiffusionConfig(**settings, **band)).chance
    assert abs(chance - len(inside) / len(whole)) < 0.015, "four standard deviations of 20000 draws"


def test_which_samples_are_given_their_first_frame():
    flow = FlowMatching(DiffusionConfig())
    drawn = flow.draw_given_frames(1, range(4000), [0] * 4000, 0.5)
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert 0.47 < drawn.mean() < 0.53
    assert torch.equal(flow.draw_given_frames(1, [7], [0], 0.5), drawn[7:8]), "a sample's own"
    assert not torch.equal(flow.draw_given_frames(1, range(4000), [1] * 4000, 0.5), drawn), "again in each epoch"
    sigma = flow.draw_timesteps(1, range(4000), [0] * 4000)[0]
    assert abs(float(torch.corrcoef(torch.stack((drawn, sigma)))[0, 1])) < 0.06, "a stream of its own"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_is_set_is_the_one(share):
    flow = FlowMatching(DiffusionConfig(first_frame_share=share))
    assert flow.draw_given_frames(1, range(200), [0] * 200, 0.5).tolist() == [share] * 200


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_of_stable_diffusion_3_are_diffusers(scheme: Any) -> None:
    flow = FlowMatching(DiffusionConfig(shift=5.0, loss_weighting=scheme))
    theirs = compute_loss_weighting_for_sd3(scheme, flow.sigmas)
    torch.testing.assert_close(flow.weights, theirs, rtol=1e-5, atol=0)
    _, timestep, weight = flow.draw_timesteps(3, range(50), [0] * 50)
    torch.testing.assert_close(weight, compute_loss_weighting_for_sd3(scheme, timestep / 1000), rtol=1e-5, atol=0)
