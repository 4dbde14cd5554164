"""Samplers: integrate the learned velocity from noise to latents. Thin wrappers around diffusers' schedulers.

They differ in their grids of noise levels, too. With S steps and shift(s) = k s / (1 + (k - 1) s):

- `unipc` and `dpm++`: s from 0.999 to 0 in S + 1 points without the last, shifted, and the timesteps cut to whole
  numbers, as the Wan release's UniPC (wan/utils/fm_solvers_unipc.py). diffusers' default goes from 1 to 1/1000.
- `euler`: s from 1 to 0 in S + 1 points without the last, shifted; timesteps stay fractional, as the release's DPM++
  (get_sampling_sigmas). diffusers' default for this scheduler shifts its lower end twice.

All end at noise level 0. The noise levels are handed to diffusers' schedulers, which do the steps.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

Solver = Literal["unipc", "euler", "dpm++"]
StrengthSteps = Literal["last", "all"]
"""Steps that are taken from given latents: the last ones of the whole grid, or all, of a grid that begins lower."""

RELEASE_FIRST_SIGMA = float(np.float32(1 - 1 / 1000))
"""Of the release's UniPC, before the shift. It keeps the number in fp32, which decides where timesteps are cut."""


class Sampler:
    """One run of a scheduler, from its first timestep to its last.

    UniPC and DPM++ remember earlier steps, so a sampler serves one batch of latents; make a new one for the next.

    Attributes:
        timesteps: [S] fp32, what the model is called with, in order.
        first_sigma: the noise level in [0, 1] of the latents that the first step takes.
    """

    def __init__(self, scheduler: Any, start: int = 0) -> None:
        """Wrap a diffusers scheduler whose `set_timesteps` was called; begin at its timestep of index `start`."""
        self._scheduler = scheduler
        # Steps are counted from here instead of looked up by timestep, since UniPC's whole timesteps may repeat.
        scheduler.set_begin_index(start)
        self.timesteps: Tensor = scheduler.timesteps.float()[start:]
        self.first_sigma = float(scheduler.sigmas[start])

    def step(self, velocity: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """One step towards the data.

        Args:
            velocity: [B, C, F, H, W], the model's output at `latents` and `t`.
            t: the element of `timesteps` that is due.
            latents: [B, C, F, H, W] fp32.

        Returns:
            The latents at the next noise level, fp32.
        """
        result: Tensor = self._scheduler.step(velocity.float(), t, latents.float(), return_dict=False)[0]
        return result


def make_sampler(
    solver: Solver,
    num_steps: int,
    shift: float,
    *,
    device: torch.device | None = None,
    solver_order: int = 2,
    solver_type: Literal["bh1", "bh2"] = "bh2",
    strength: float = 1.0,
    strength_steps: StrengthSteps = "last",
) -> Sampler:
    """A sampler ready for its first step.

    Args:
        solver: `unipc` (Zhao et al. 2023, arXiv 2302.04867), `dpm++` (Lu et al. 2022, arXiv 2211.01095) or `euler`.
        num_steps: how many times the model is evaluated (twice as many with guidance).
        shift: of the noise levels; 3 for 480p and 5 for 720p are usual.
        device: where `timesteps` lie.
        solver_order: of UniPC and DPM++. solver_type: of UniPC alone.
        strength: of given latents with noise; 1 begins with noise alone.
        strength_steps: `last` takes the last int(num_steps * strength) steps, `all` takes all, on a grid whose levels
            before the shift begin at `strength` instead of 1, as in DiffSynth-Studio.
    """
    highest = strength if strength_steps == "all" else 1.0
    start = 0 if strength_steps == "all" else num_steps - int(num_steps * strength)
    scheduler: Any
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        scheduler.set_timesteps(sigmas=_even(highest, num_steps).tolist(), device=device)
        return Sampler(scheduler, start)
    even = _even(RELEASE_FIRST_SIGMA * highest, num_steps)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    ends = {"final_sigmas_type": "zero", "lower_order_final": True}
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=1000,
            solver_order=solver_order,
            solver_type=solver_type,
            predict_x0=True,
            **flow,
            **ends,
        )
        scheduler.set_timesteps(sigmas=even, device=device)
    else:
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=1000, solver_order=solver_order, algorithm_type="dpmsolver++", **flow, **ends
        )
        scheduler.set_timesteps(num_steps, device=device)
        shifted = shift * even / (1 + (shift - 1) * even)  # it takes no levels; its own are these where all steps are
        scheduler.sigmas = torch.from_numpy(np.append(shifted, 0.0).astype(np.float32))
        scheduler.timesteps = torch.from_numpy((1000 * shifted).astype(np.int64)).to(device)
    return Sampler(scheduler, start)


def _even(highest: float, num_steps: int) -> Any:
    """Noise levels from the highest down to 0 in equal steps, without the last one, [num_steps] fp64."""
    return np.linspace(highest, 0.0, num_steps + 1)[:-1]
