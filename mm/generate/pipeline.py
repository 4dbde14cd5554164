"""Arithmetic of generation: initial latents, denoising with classifier-free guidance, pixels as frames.

Shapes: B clips, C latent channels, F H W latent frames, height and width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mm.diffusion.samplers import Sampler
from mm.errors import DataError
from mm.rng import generator
from mm.wan.inputs import ModelInputs
from mm.wan.reuse import BlockReuse

TIMESTEPS = 1000  # of noise level 1
OnStep = Callable[[Tensor], object]
"""Function that is called after a step with the clean latents that it predicts, [B, C, F, H, W] fp32, and returns
nothing of use."""


class Velocity(Protocol):
    """A transformer such as `mm.wan.model.WanModel`."""

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """Noisy latents [B, C, F, H, W] and what belongs to them to the velocity [B, C, F, H, W]."""
        ...


def initial_latents(seed: int, prompts: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one clip for each prompt's index, [B, *shape] fp32 on the CPU.

    A clip depends on (seed, index) alone: not on the device, nor on which prompts share a batch.
    """
    return torch.stack(
        [
            torch.randn(tuple(shape), generator=generator(seed, "initial_noise", index, 0), dtype=torch.float32)
            for index in prompts
        ]
    )


def noisy_latents(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Latents of a given clip at a noise level, (1 - sigma) clean + sigma noise in fp32; sigma 1 is noise alone."""
    return (1 - sigma) * clean.float() + sigma * noise.float()


def pad_text(features: Sequence[Tensor], text_len: int) -> Tensor:
    """Text features of true length, each [L, text_dim], padded with zero vectors to [B, text_len, text_dim]."""
    padded = features[0].new_zeros(len(features), text_len, features[0].shape[-1])
    for row, feature in zip(padded, features, strict=True):
        row[: len(feature)] = feature
    return padded


@torch.no_grad()
def denoise(
    model: Velocity,
    latents: Tensor,
    text: Tensor,
    negative: Tensor | None,
    sampler: Sampler,
    guidance_scale: float | Callable[[float], float],
    *,
    features: Mapping[str, Tensor] | None = None,
    batched_guidance: bool = False,
    reuse_at: Callable[[int], BlockReuse] | None = None,
    on_step: OnStep = lambda clean: None,
) -> Tensor:
    """Integrate the velocity from noise to latents, as Wan does (arXiv 2503.20314; guidance: arXiv 2207.12598).

    The velocity is v_neg + guidance_scale (v_pos - v_neg); a scale of exactly 1 is v_pos, and the negative pass is left
    out.

    Args:
        model: the transformer.
        latents: [B, C, F, H, W], what the sampler begins with, on the model's device.
        text: [B, L, text_dim], padded text features of the prompts.
        negative: the same of the negative prompt; may be None where guidance_scale is always 1.
        sampler: new, from `mm.diffusion.samplers.make_sampler`.
        guidance_scale: strength of the guidance, or a function that tells it of a timestep.
        features: what the model's task declares, as in `ModelInputs`; the same for both prompts.
        batched_guidance: both prompts in one pass of twice the batch, instead of two passes one after the other.
        reuse_at: what decides at each step whether the transformer's blocks run; None where they always do.
        on_step: called after every step.

    Returns:
        [B, C, F, H, W] fp32, normalised latents of the clips.

    Raises:
        DataError: DATA-056 when the latents are no longer finite numbers.
    """
    latents = latents.float()
    for step, t in enumerate(sampler.timesteps):
        scale = guidance_scale(float(t)) if callable(guidance_scale) else guidance_scale
        guided = scale != 1
        if negative is None and guided:
            raise ValueError("guidance needs the negative prompt's features")
        texts = [text, negative] if negative is not None and guided else [text]
        timestep = t.expand(len(latents)).to(latents.device)
        inputs = ModelInputs(latents, timestep, text, features or {}, reuse=reuse_at(step) if reuse_at else None)
        velocities = _velocities(model, inputs, texts, batched_guidance)
        velocity = velocities[0]
        if guided:
            velocity = velocities[1] + scale * (velocity - velocities[1])
        clean = latents - float(t) / TIMESTEPS * velocity
        latents = sampler.step(velocity, t, latents)
        on_step(clean)
    if not torch.isfinite(latents).all():
        raise DataError(
            "DATA-056",
            "The transformer's output is not finite.",
            "Check the weights (a diverged training run?), and use bf16 or fp32 as predictor.dtype.",
        )
    return latents


def _velocities(model: Velocity, inputs: ModelInputs, texts: Sequence[Tensor], batched: bool) -> list[Tensor]:
    """The velocity for each of `texts`, [B, C, F, H, W] fp32, from one pass or one pass each."""
    if not batched or len(texts) == 1:
        return [model(replace(inputs, text=text).part(number)).float() for number, text in enumerate(texts)]
    twice = inputs.each(lambda value: torch.cat((value, value)))
    both = model(replace(twice, text=torch.cat(list(texts))))
    return list(both.float().chunk(2))


def to_frames(pixels: Tensor) -> Tensor:
    """Decoded pixels [B, 3, frames, height, width] in [-1, 1] to uint8 [B, frames, height, width, 3] on the CPU."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu()
