"""The `diffusion` section of pretrain_model.json: the training objective."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from mm.config.base import Section

TimestepSampling = Literal["grid", "logit_normal", "mode"]
LossWeighting = Literal["gaussian", "none", "sigma_sqrt", "cosmap"]

LEAST_MOTION_FRAMES = 3
"""Latent frames of a sample that has the loss of `motion_loss_ratio`; shorter ones have that of the velocity alone."""
MODE_SCALE = 1.29
"""Of `mode` where nothing is said: the one that Esser et al. 2024 found best of it."""
LARGEST_MODE_SCALE = 2 / (math.pi - 2)
"""Above it the density of `mode` has no formula: two uniform numbers give one level (Esser et al. 2024, eq. 20)."""


class DiffusionConfig(Section):
    """Flow matching on a shifted noise grid.

    Attributes:
        model_id: the only objective there is.
        num_train_timesteps: points of the grid, and the timestep that stands for pure noise.
        shift: how far the grid leans towards noise; 1 leaves it even.
        sigma_min: the noise level that the unshifted grid runs down to.
        extra_one_step: leave the last point (`sigma_min` itself) out of the grid.
        timestep_sampling: `grid` draws a point of the grid with equal chances; `logit_normal` draws
            sigma = sigmoid(normal) and then shifts it (Esser et al. 2024, arXiv 2403.03206, section 3.1); `mode` bends
            a uniform number towards the middle, or away from it, and then shifts it (the same, equation 20).
        logit_mean, logit_std: of that normal, only with `logit_normal`. A mean above 0 draws more noise; VideoX-Fun's
            and diffusers' training scripts count the grid from noise to data: their mean is the negative of this one.
        mode_scale: of `mode`, and only with it: above 0 draws more of the middle, below 0 more of the ends, 0 all
            alike; None takes `MODE_SCALE`.
        loss_weighting: `gaussian` favours the middle timesteps; `none` weighs all alike; `sigma_sqrt` and `cosmap` are
            those of Stable Diffusion 3 (Esser et al. 2024, section 3.1), which favour little noise, and the middle.
        motion_loss_ratio: share that the loss of differences between neighbouring latent frames has in that of a sample
            with at least three (VideoX-Fun's `motion_sub_loss`); None for no such loss.
        timestep_slices: `step` cuts the grid into equal slices, one after the other for the samples of a step, so that
            every step has levels of all kinds (VideoX-Fun's `uniform_sampling`); None: each draws in all of it.
        first_frame_share: share of samples that are given their first latent frame clean, of tasks that have it; None
            for that of the task.
        band_from, band_below: noise levels that are drawn, from the first on and below the second, such as those of one
            of two experts; None for no limit. Chances within them, and weights, are as without.
    """

    model_id: Literal["wan_flow_match_scheduler"] = "wan_flow_match_scheduler"
    num_train_timesteps: int = Field(1000, ge=2)
    shift: float = Field(5.0, gt=0)
    sigma_min: float = Field(0.0, ge=0, lt=1)
    extra_one_step: bool = True
    timestep_sampling: TimestepSampling = "grid"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    mode_scale: float | None = Field(None, ge=-1, le=LARGEST_MODE_SCALE)
    loss_weighting: LossWeighting = "gaussian"
    motion_loss_ratio: float | None = Field(None, gt=0, le=1)
    timestep_slices: Literal["step"] | None = None
    first_frame_share: float | None = Field(None, ge=0, le=1)
    band_from: float | None = Field(None, ge=0, le=1)
    band_below: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _logit_keys_need_logit_normal(self) -> DiffusionConfig:
        given = sorted({"logit_mean", "logit_std"} & self.model_fields_set)
        if given and self.timestep_sampling != "logit_normal":
            raise ValueError(
                f"{' and '.join(given)} has no effect with timestep_sampling "
                f'"{self.timestep_sampling}"; remove it or choose "logit_normal"'
            )
        return self

    @model_validator(mode="after")
    def _mode_scale_needs_mode(self) -> DiffusionConfig:
        if self.mode_scale is not None and self.timestep_sampling != "mode":
            raise ValueError(
                f'mode_scale has no effect with timestep_sampling "{self.timestep_sampling}"; '
                'remove it or choose "mode"'
            )
        return self

    @model_validator(mode="after")
    def _slices_need_the_grid(self) -> DiffusionConfig:
        if self.timestep_slices is not None and self.timestep_sampling != "grid":
            raise ValueError(
                f'timestep_slices has no effect with timestep_sampling "{self.timestep_sampling}"; remove one of them'
            )
        return self

    @property
    def band(self) -> tuple[float, float]:
        """Limits of the noise levels that are drawn: the first is one, the second is above all."""
        low, high = self.band_from, self.band_below
        return 0.0 if low is None else low, math.inf if high is None else high

    def levels(self) -> list[float]:
        """The grid's noise levels, shifted, downwards."""
        count = self.num_train_timesteps
        parts = count if self.extra_one_step else count - 1
        even = (1 - (1 - self.sigma_min) * index / parts for index in range(count))
        return [self.shift * level / (1 + (self.shift - 1) * level) for level in even]
