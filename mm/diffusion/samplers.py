"""Samplers: integrate the learned velocity from noise to latents. Thin wrappers around diffusers' schedulers.

The two differ in their grids of noise levels, too. With S steps and shift(s) = k s / (1 + (k - 1) s):

- `unipc`: s from 0.999 to 0 in S + 1 points without the last, shifted, and the timesteps cut to whole numbers, as the
  Wan release's UniPC (wan/utils/fm_solvers_unipc.py). diffusers' default goes from 1 to 1/1000.
- `euler`: s from 1 to 0 in S + 1 points without the last, shifted; timesteps stay fractional, as the release's DPM++
  (get_sampling_sigmas). diffusers' default for this scheduler shifts its lower end twice.

Both end at noise level 0. The noise levels are handed to diffusers' schedulers, which do the steps.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

Solver = Literal["unipc", "euler"]

RELEASE_FIRST_SIGMA = float(np.float32(1 - 1 / 1000))
"""Of the release's UniPC, before the shift. It keeps the number in fp32, which decides where timesteps are cut."""


class Sampler:
    """One run of a scheduler, from its first timestep to its last.

    UniPC remembers earlier steps, so a sampler serves one batch of latents; make a new one for the next.

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
) -> Sampler:
    """A sampler ready for its first step.

    Args:
        solver: `unipc` (Zhao et al. 2023, arXiv 2302.04867) or `euler`.
        num_steps: how many times the model is evaluated (twice as many with guidance).
        shift: of the noise levels; 3 for 480p and 5 for 720p are usual.
        device: where `timesteps` lie.
        solver_order, solver_type: of UniPC alone.
        strength: the last int(num_steps * strength) steps are taken, from given latents with noise; 1 takes all.
    """
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=1000,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
            solver_order=solver_order,
            solver_type=solver_type,
            final_sigmas_type="zero",
            lower_order_final=True,
            predict_x0=True,
        )
        even = np.linspace(RELEASE_FIRST_SIGMA, 0.0, num_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=even, device=device)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        even = np.linspace(1.0, 0.0, num_steps + 1)[:-1]
        scheduler.set_timesteps(sigmas=even.tolist(), device=device)
    return Sampler(scheduler, num_steps - int(num_steps * strength))
