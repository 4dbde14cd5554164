"""Samplers: their grids against published tables and diffusers, their steps against exact trajectories."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file

from mm.diffusion.samplers import make_sampler

# First four and last timestep of 50 steps on Wan's grid
EULER_TABLE = {
    3: ([1000, 993.24, 986.30, 979.17], 57.69),
    5: ([1000, 995.93, 991.74, 987.39], 92.59),
    8: ([1000, 997.46, 994.82, 992.08], 140.35),
    16: ([1000, 998.73, 997.40, 996.03], 246.15),
}


@pytest.mark.parametrize("shift", EULER_TABLE)
def test_euler_timesteps(shift):
    timesteps = make_sampler("euler", 50, float(shift)).timesteps
    first, last = EULER_TABLE[shift]
    assert len(timesteps) == 50
    assert timesteps.dtype == torch.float32
    assert timesteps[:4].tolist() == pytest.approx(first, abs=0.006)
    assert timesteps[-1].item() == pytest.approx(last, abs=0.006)


# What the Wan release's UniPC prints for 50 steps with shift 5.
UNIPC_TABLE = [
    999, 995, 991, 987, 982, 978, 973, 968, 963, 957, 952, 946, 940, 934, 927, 920, 913, 906, 898, 890, 882, 873, 863,
    854, 843, 833, 821, 809, 796, 783, 768, 753, 737, 720, 701, 681, 660, 636, 611, 584, 555, 522, 487, 448, 405, 356,
    302, 241, 172, 92,
]  # fmt: skip
UNIPC_BITS = {0: 1065349858, 15: 1064024630, 19: 1063516924}  # of its fp32 noise levels


def test_unipc_runs_on_the_grid_of_the_release():
    sampler = make_sampler("unipc", 50, 5.0)
    assert sampler.timesteps.dtype == torch.float32
    assert sampler.timesteps.tolist() == UNIPC_TABLE
    sigmas = sampler._scheduler.sigmas
    assert {step: sigmas[step].view(torch.int32).item() for step in UNIPC_BITS} == UNIPC_BITS
    assert sigmas[-2:].tolist() == pytest.approx([0.0925, 0.0], abs=5e-5)  # diffusers' default ends at 0.0968
    assert sampler.first_sigma == sigmas[0]


@pytest.mark.parametrize("shift", [1.0, 3.0, 16.0])
@pytest.mark.parametrize("num_steps", [1, 4, 37, 50])
def test_unipc_noise_levels_follow_the_formula(shift, num_steps):
    sampler = make_sampler("unipc", num_steps, shift)
    even = 0.999 * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
    shifted = shift * even / (1 + (shift - 1) * even)
    torch.testing.assert_close(sampler._scheduler.sigmas[:-1].double(), shifted, rtol=0, atol=2e-7)
    assert sampler._scheduler.sigmas[-1] == 0
    cut = 1000 * shifted - sampler.timesteps.double()
    assert cut.min() > -1e-3 and cut.max() < 1
    # only the grid is ours
    reference = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    reference.set_timesteps(sigmas=even.numpy())
    latents, velocity = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    theirs = ours = latents
    for t, their_t in zip(sampler.timesteps, reference.timesteps, strict=True):
        ours = sampler.step(velocity * (1 + ours), t, ours)
        theirs = reference.step(velocity * (1 + theirs), their_t, theirs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 4, 20])
def test_dpm_is_the_scheduler_of_diffusers_on_its_own_grid(num_steps, shift, order):
    sampler = make_sampler("dpm++", num_steps, shift, solver_order=order)
    reference = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )
    reference.set_timesteps(num_steps)
    torch.testing.assert_close(sampler._scheduler.sigmas, reference.sigmas, rtol=0, atol=2e-7)
    assert (sampler.timesteps - reference.timesteps).abs().max() <= 1  # cut where they are next to a whole number
    latents, velocity = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    theirs = ours = latents
    for t, their_t in zip(sampler.timesteps, reference.timesteps, strict=True):
        ours = sampler.step(velocity * (1 + ours), t, ours)
        theirs = reference.step(velocity * (1 + theirs), their_t, theirs, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def schedules():
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    return load_file(Path(folder) / "schedules.safetensors")


@pytest.mark.parametrize(
    ("name", "num_steps", "shift", "strength"),
    [
        ("diffsynth.infer.50steps.strength1.0.shift5", 50, 5.0, 1.0),
        ("diffsynth.infer.30steps.strength0.7.shift3", 30, 3.0, 0.7),
        ("diffsynth.infer.4steps.strength1.0.shift8", 4, 8.0, 1.0),
        ("diffsynth.train.shift1", 1000, 1.0, 1.0),
        ("diffsynth.train.shift8", 1000, 8.0, 1.0),
        ("videox_fun.train", 1000, 5.0, 1.0),
    ],
)
def test_euler_runs_on_the_schedules_of_other_systems(name, num_steps, shift, strength):
    found = make_sampler("euler", num_steps, shift, strength=strength, strength_steps="all")
    expected = schedules()
    torch.testing.assert_close(found.timesteps, expected[f"{name}.timesteps"], rtol=0, atol=5e-4)
    torch.testing.assert_close(found._scheduler.sigmas[:-1], expected[f"{name}.sigmas"], rtol=0, atol=2e-6)
    assert found.first_sigma == pytest.approx(expected[f"{name}.sigmas"][0].item(), abs=2e-6)


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
def test_a_strength_takes_the_last_steps_or_all(solver):
    whole = make_sampler(solver, 10, 5.0)
    last = make_sampler(solver, 10, 5.0, strength=0.4)
    assert torch.equal(last.timesteps, whole.timesteps[-4:])
    every = make_sampler(solver, 10, 5.0, strength=0.4, strength_steps="all")
    first = 0.4 * (1 if solver == "euler" else 0.999)
    assert len(every.timesteps) == 10
    assert every.first_sigma == pytest.approx(5 * first / (1 + 4 * first), abs=1e-6)
    assert (every.timesteps.diff() < 0).all()


@pytest.mark.parametrize("solver", ["unipc", "euler", "dpm++"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_a_straight_trajectory_is_followed_exactly(solver, num_steps):
    source = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 1, 4, 2, 3, 3, generator=source)
    sampler = make_sampler(solver, num_steps, 5.0)
    assert len(sampler.timesteps) == num_steps
    latents = noise
    for t in sampler.timesteps:
        latents = sampler.step((noise - data).bfloat16().float(), t, latents)
    exact = noise - sampler.first_sigma * (noise - data).bfloat16().float()
    assert latents.dtype == torch.float32
    assert (latents - exact).abs().max() < 2e-5


def test_unipc_and_dpm_are_of_higher_order_than_euler():
    """For data N(0, s^2) the exact velocity is known: x follows sqrt((1 - t)^2 s^2 + t^2) times a constant."""
    scale = 0.3
    noise = torch.linspace(-2, 2, 9).view(1, 1, 1, 3, 3)

    def error(solver, num_steps):
        sampler = make_sampler(solver, num_steps, 1.0)
        latents = noise
        for t in sampler.timesteps:
            sigma = sampler._scheduler.sigmas[sampler._scheduler.step_index or 0]
            variance = (1 - sigma) ** 2 * scale**2 + sigma**2
            velocity = latents * (sigma - (1 - sigma) * scale**2) / variance
            latents = sampler.step(velocity, t, latents)
        return (latents - scale * noise).abs().max().item()

    # halving the step of a first-order method halves its error
    assert error("euler", 100) / error("euler", 200) == pytest.approx(2.0, rel=0.1)
    assert error("unipc", 50) < error("euler", 200)
    assert error("dpm++", 50) < error("euler", 200)


def test_velocity_of_lower_precision_keeps_the_latents_in_fp32():
    for solver in ("unipc", "euler", "dpm++"):
        sampler = make_sampler(solver, 3, 3.0)
        latents = torch.zeros(1, 2, 1, 2, 2)
        out = sampler.step(torch.ones(1, 2, 1, 2, 2, dtype=torch.bfloat16), sampler.timesteps[0], latents)
        assert out.dtype == torch.float32
