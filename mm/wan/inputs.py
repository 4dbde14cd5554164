"""What the transformer takes: the checks of its shapes, and the condition put behind the noisy latents.

Shapes: B batch, C latent channels, F H W latent frames, height and width, I image tokens, L text tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.config.model import MASK_CHANNELS, WanConfig
from mm.errors import ConfigError


def beside(latents: Tensor, condition: Tensor | None) -> Tensor:
    """[B, C, F, H, W] noisy latents with the condition's channels behind their own; alone without a condition."""
    return latents if condition is None else torch.cat((latents, condition.to(latents.dtype)), dim=1)


def check_inputs(
    config: WanConfig,
    latents: Tensor,
    timestep: Tensor,
    text: Tensor,
    image_features: Tensor | None,
    condition: Tensor | None,
) -> None:
    """Check the arguments of `mm.wan.model.WanModel.forward`.

    Raises:
        ConfigError: CFG-041 latents, CFG-042 text features, CFG-043 timesteps of another shape; CFG-056 to CFG-059
            from `_check_images`.
    """
    if latents.ndim != 5 or latents.shape[1] != config.noise_channels:
        raise ConfigError(
            "CFG-041",
            f"Latents have shape {tuple(latents.shape)}, expected [B, {config.noise_channels}, F, H, W].",
            "Give latents of the VAE this model was trained with.",
        )
    batch = latents.shape[0]
    if text.ndim != 3 or text.shape[0] != batch or text.shape[1] < 1 or text.shape[2] != config.text_dim:
        raise ConfigError(
            "CFG-042",
            f"Text features have shape {tuple(text.shape)}, expected [{batch}, L, {config.text_dim}].",
            "Give features of the text encoder this model was trained with, one row for each latent.",
        )
    if tuple(timestep.shape) != (batch,):
        raise ConfigError(
            "CFG-043",
            f"Timesteps have shape {tuple(timestep.shape)}, expected [{batch}].",
            "Give one timestep for each latent.",
        )
    _check_images(config, latents, image_features, condition)


def _check_images(config: WanConfig, latents: Tensor, image_features: Tensor | None, condition: Tensor | None) -> None:
    """CFG-056 missing, CFG-057 given to a text-to-video model, CFG-058 and CFG-059 of another shape."""
    named = {"image features": image_features, "condition latents": condition}
    given = [name for name, value in named.items() if value is not None]
    if not config.image_tokens:
        if given:
            raise ConfigError(
                "CFG-057",
                f"This {config.model_type} model was given {' and '.join(given)}.",
                "Leave them out, or use the weights of an image-to-video model.",
            )
        return
    if image_features is None or condition is None:
        raise ConfigError(
            "CFG-056",
            f"This {config.model_type} model needs {' and '.join(named)}; given: {' and '.join(given) or 'neither'}.",
            "Give both, or use the weights of a text-to-video model.",
        )
    batch, _, *size = latents.shape
    expected = [batch, config.image_tokens, config.image_dim]
    if list(image_features.shape) != expected:
        raise ConfigError(
            "CFG-058",
            f"Image features have shape {tuple(image_features.shape)}, expected {expected}.",
            "Give features of the image encoder this model was trained with, of one image for each latent in i2v and "
            "of two, first and last, in flf2v.",
        )
    expected = [batch, config.condition_channels, *size]
    if list(condition.shape) != expected:
        raise ConfigError(
            "CFG-059",
            f"Condition latents have shape {tuple(condition.shape)}, expected {expected}.",
            f"Give {MASK_CHANNELS} mask channels and the known frames' latents, in the size of the noisy latents.",
        )
