"""Flow matching: noise levels, what is drawn for a sample, the target and the loss.

With x0 the clean latents and e standard normal noise, the noisy latents at noise level sigma in [0, 1] are
x = (1 - sigma) x0 + sigma e, and the model learns the velocity dx/dsigma = e - x0 (Lipman et al. 2023, arXiv
2210.02747; Liu et al. 2023, arXiv 2209.03003). The model sees the timestep 1000 sigma, a float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mm.config.diffusion import MODE_SCALE, DiffusionConfig
from mm.rng import generator, training_noise

SampleId = int | str
PlaceInStep = tuple[int, int]
"""Number of a sample in its step, from 0, and the samples of the step."""


class FlowMatching:
    """The training objective for one configuration.

    Attributes:
        sigmas: [N] fp32, the shifted grid of noise levels, from pure noise downwards.
        timesteps: [N] fp32, `num_train_timesteps * sigmas`.
        weights: [N] fp32, the loss weight at each timestep; with `gaussian` their mean is 1.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self._grid = _sigma_grid(config)
        timesteps = config.num_train_timesteps * self._grid
        bells = self._bell(timesteps)
        self._bell_floor = bells.min()
        self._bell_mean = (bells - self._bell_floor).mean()
        self.sigmas = self._grid.float()
        self.timesteps = timesteps.float()
        self.weights = self.weight_of(timesteps).float()

    @cached_property
    def _drawn(self) -> Tensor:
        """Noise levels of the grid that lie in the band; found when one is drawn, since dry runs draw none."""
        low, high = self.config.band
        return self._grid[(self._grid >= low) & (self._grid < high)]

    @property
    def chance(self) -> float:
        """Chance that a noise level which is drawn without the configuration's band lies in it."""
        if self.config.timestep_sampling == "grid":
            return len(self._drawn) / len(self._grid)
        low, high = self._chances_of_the_band
        return float(high - low)

    def draw_timesteps(
        self,
        seed: int,
        samples: Sequence[SampleId],
        draws: Sequence[int],
        places: Sequence[PlaceInStep] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw one noise level for each sample of a batch.

        Each depends on (seed, sample, draw) alone, and with slices on its place in the step: neither the batch's
        make-up nor the rank changes it.

        Args:
            seed: the run's seed.
            samples: identity of each sample in the data set.
            draws: how often each sample was drawn before.
            places: of each in its step, by which it has its slice; None for samples of no step, which have no slices.

        Returns:
            sigma [B], timestep [B] and loss weight [B], fp32 on the CPU.
        """
        sliced = places is not None and self.config.timestep_slices is not None
        each = zip(samples, draws, places if sliced and places is not None else [None] * len(samples), strict=True)
        sigma = torch.stack(
            [self._draw_sigma(generator(seed, "timestep", sample, draw), place) for sample, draw, place in each]
        )
        timestep = self.config.num_train_timesteps * sigma
        return sigma.float(), timestep.float(), self.weight_of(timestep).float()

    def draw_noise(self, seed: int, samples: Sequence[SampleId], draws: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Draw the noise of each sample, [B, *shape] fp32 on the CPU; keyed as in `draw_timesteps`."""
        return torch.stack(
            [training_noise(seed, sample, draw, shape) for sample, draw in zip(samples, draws, strict=True)]
        )

    def draw_given_frames(
        self, seed: int, samples: Sequence[SampleId], draws: Sequence[int], usual_share: float
    ) -> Tensor:
        """Draw which samples are given their first latent frame clean; keyed as in `draw_timesteps`.

        Args:
            seed, samples, draws: as there.
            usual_share: of the samples that are, where the configuration says nothing else.

        Returns:
            [B] fp32 on the CPU, 1 where it is given, else 0.
        """
        share = usual_share if self.config.first_frame_share is None else self.config.first_frame_share
        each = [generator(seed, "given_frame", sample, draw) for sample, draw in zip(samples, draws, strict=True)]
        return (torch.stack([torch.rand((), generator=source) for source in each]) < share).float()

    def noisy(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """x = (1 - sigma) x0 + sigma noise in fp32; x0 and noise [B, ...], sigma [B]."""
        sigma = sigma.to(device=x0.device, dtype=torch.float32).view(-1, *[1] * (x0.dim() - 1))
        return (1 - sigma) * x0.float() + sigma * noise.float()

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity that the model should predict, noise - x0 in fp32, [B, ...]."""
        return noise.float() - x0.float()

    def loss(
        self, prediction: Tensor, target: Tensor, weight: Tensor, elements: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error in fp32.

        Args:
            prediction: [B, ...] velocity from the model, any floating type.
            target: [B, ...] from `target`.
            weight: [B] from `draw_timesteps`.
            elements: of a whole sample, or [B] of each, when `prediction` is only a part of it: the losses of the parts
                then add up to the loss of the whole. Default: those at hand.

        Returns:
            The batch's loss (scalar: mean of the samples' losses) and the samples' losses [B], both weighted.
        """
        squared = (prediction.float() - target.float()).square().flatten(1)
        mean = squared.sum(dim=1) / (squared.shape[1] if elements is None else elements)
        per_sample = mean * weight.to(device=squared.device, dtype=torch.float32)
        return per_sample.mean(), per_sample

    def weight_of(self, timestep: Tensor) -> Tensor:
        """Loss weight at any timesteps in [0, num_train_timesteps], of their shape and type.

        `gaussian`: exp(-2 ((t - N/2) / N)^2), lowered so that the grid's least weight is 0 and scaled so that the
        grid's mean is 1. Pure noise (t = N) therefore has weight 0. `sigma_sqrt`: 1 / sigma^2. `cosmap`:
        2 / (pi (1 - 2 sigma + 2 sigma^2)).
        """
        sigma = timestep / self.config.num_train_timesteps
        match self.config.loss_weighting:
            case "none":
                return torch.ones_like(timestep)
            case "sigma_sqrt":
                return sigma**-2.0
            case "cosmap":
                return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
            case "gaussian":
                return (self._bell(timestep) - self._bell_floor) / self._bell_mean

    def _bell(self, timestep: Tensor) -> Tensor:
        steps = self.config.num_train_timesteps
        return torch.exp(-2 * ((timestep - steps / 2) / steps) ** 2)

    def _draw_sigma(self, source: torch.Generator, place: PlaceInStep | None) -> Tensor:
        match self.config.timestep_sampling:
            case "logit_normal":
                return self._draw_logit_normal(source)
            case "mode":
                return self._draw_mode(source)
        levels = self._drawn
        if place is not None:
            begin, end = slice_of_step(*place, len(levels))
            levels = levels[begin:end]
        return levels[torch.randint(len(levels), (), generator=source)]

    def _draw_mode(self, source: torch.Generator) -> Tensor:
        low, high = self._chances_of_the_band
        uniform = torch.rand((), generator=source, dtype=torch.float64)
        # the level falls while the uniform number rises
        return shift_sigma(mode_level(1 - high + uniform * (high - low), self._mode_scale), self.config.shift)

    @property
    def _mode_scale(self) -> float:
        return MODE_SCALE if self.config.mode_scale is None else self.config.mode_scale

    def _draw_logit_normal(self, source: torch.Generator) -> Tensor:
        if self.config.band_from is None and self.config.band_below is None:
            normal = torch.randn((), generator=source, dtype=torch.float64)
        else:
            normal = self._normal_of_the_band(torch.rand((), generator=source, dtype=torch.float64))
        return shift_sigma(torch.sigmoid(self.config.logit_mean + self.config.logit_std * normal), self.config.shift)

    def _normal_of_the_band(self, chance: Tensor) -> Tensor:
        """The normal number below which that share of the band's are."""
        low, high = self._chances_of_the_band
        return torch.special.ndtri(low + chance * (high - low))

    @cached_property
    def _chances_of_the_band(self) -> tuple[Tensor, Tensor]:
        """Chances of a noise level below the band's first, and below its end, of densities without a band."""
        limits = torch.tensor(self.config.band, dtype=torch.float64).clamp(0, 1)
        even = limits / (self.config.shift - (self.config.shift - 1) * limits)  # `shift_sigma` undone
        if self.config.timestep_sampling == "mode":
            low, high = mode_chances_below(even, self._mode_scale)
            return low, high
        low, high = torch.special.ndtr((torch.logit(even) - self.config.logit_mean) / self.config.logit_std)
        return low, high


def slice_of_step(place: int, samples: int, levels: int) -> tuple[int, int]:
    """The slice of a schedule that a sample of a step draws from, as its first index and the one behind its last.

    There are as many slices as samples where the levels divide by that; else as many as divide both, and samples that
    follow each other share one.

    Args:
        place: of the sample in its step, from 0. samples: of the step. levels: of the schedule.

    Source: VideoX-Fun's DiscreteSampling, with a sample of the step in the place of a process.
    """
    sharing = next(n for n in range(1, samples + 1) if samples % n == 0 and levels % (samples // n) == 0)
    size = levels // (samples // sharing)
    begin = place // sharing * size
    return begin, begin + size


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels towards noise: shift s / (1 + (shift - 1) s) (arXiv 2403.03206, equation 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def mode_level(uniform: Tensor, scale: float) -> Tensor:
    """Noise levels, not yet shifted, of uniform numbers in [0, 1]: 1 - u - s (cos^2(pi u / 2) - 1 + u).

    Source: Esser et al. 2024, arXiv 2403.03206, equation 20. They fall from 1 to 0.
    """
    return 1 - uniform - scale * (torch.cos(math.pi / 2 * uniform) ** 2 - 1 + uniform)


def mode_chances_below(levels: Tensor, scale: float) -> Tensor:
    """Chances of a level of `mode_level` below these, which are in [0, 1]; found by halving."""
    low, high = torch.zeros_like(levels), torch.ones_like(levels)
    for _ in range(60):  # more than fp64 has bits
        middle = (low + high) / 2
        below = mode_level(1 - middle, scale) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(levels >= 1, 1.0, low)


def _sigma_grid(config: DiffusionConfig) -> Tensor:
    """[num_train_timesteps] fp64, shifted. fp64 because the weights' normalisation sums a thousand of them."""
    count = config.num_train_timesteps
    if config.extra_one_step:
        even = torch.linspace(1.0, config.sigma_min, count + 1, dtype=torch.float64)[:-1]
    else:
        even = torch.linspace(1.0, config.sigma_min, count, dtype=torch.float64)
    return shift_sigma(even, config.shift)
