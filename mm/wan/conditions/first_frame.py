"""Condition of Wan2.2's TI2V-5B: the first latent frame is given clean, and its tokens are told that they are.

Text to video has none: every token has the sample's timestep.

Source: Wan2.2's own pipeline (wan/textimage2video.py).

Shapes: B batch, C latent channels, F H W latent frames, height and width, T tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mm.errors import ConfigError
from mm.wan.inputs import ModelInputs, runs_of


def with_clean_first_frame(latents: Tensor, first: Tensor) -> Tensor:
    """Noisy latents with the given first frame in place of theirs.

    Args:
        latents: [B, C, F, H, W]. first: [B, C, 1, H, W], latents of the given image as a video of one frame.

    Raises:
        ConfigError: CFG-259 for a first frame of another shape.
    """
    expected = (*latents.shape[:2], 1, *latents.shape[3:])
    if tuple(first.shape) != expected:
        message = f"Latents of the first frame are {list(first.shape)}, expected {list(expected)}."
        raise ConfigError("CFG-259", message, "Encode the image at the clip's size, with the clip's VAE.")
    return torch.cat((first.to(latents), latents[:, :, 1:]), dim=2)


def token_timesteps(timestep: Tensor, latent_size: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """Timestep of each token where the first latent frame is given: 0 (clean) for its tokens.

    Args:
        timestep: [B] of the samples. latent_size: F, H, W. patch_size: latents of a token along each.

    Returns:
        [B, T]; T = F/p H/p W/p, frame by frame and row by row.
    """
    frames, height, width = (side // patch for side, patch in zip(latent_size, patch_size, strict=True))
    of_frames = timestep[:, None].repeat(1, frames)
    of_frames[:, 0] = 0
    return of_frames.repeat_interleave(height * width, dim=1)


def with_given_frame(inputs: ModelInputs, first: Tensor, patch_size: tuple[int, int, int]) -> ModelInputs:
    """Inputs that are given their first latent frame: it is clean, and its tokens have timestep 0.

    Args:
        inputs: of one timestep a sample. first, patch_size: as above.

    Raises:
        ConfigError: CFG-259 as above.
    """
    frames, height, width = inputs.latents.shape[2:]
    timestep, runs = runs_of(token_timesteps(inputs.timestep, (frames, height, width), patch_size))
    return replace(inputs, latents=with_clean_first_frame(inputs.latents, first), timestep=timestep, runs=runs)


def learned_frames(num_latent_frames: int) -> Tensor:
    """Latent frames that count in the loss where the first one is given, [F] bool."""
    return torch.arange(num_latent_frames) > 0
