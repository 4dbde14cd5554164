"""Conditions of Fun-Control and Control-Camera models: latents of a control video, a start image and a reference.

Source: VideoX-Fun's pipeline of Fun-Control. Of a start image the models see the latents of that one image in the first
latent frame and exact zeros behind it; DiffSynth-Studio gives them what image-to-video has, in which grey frames follow
the image. The models were trained with the first.

Shapes: C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm.wan.conditions.pixels import LATENT_CHANNELS, ClipSize, Encode, image_latents, require_video


def control_condition(
    encode: Encode,
    size: ClipSize,
    control: Tensor | None = None,
    start: Tensor | None = None,
    channels: int = LATENT_CHANNELS,
) -> Tensor:
    """Channels behind the noisy latents of a Fun-Control model.

    Args:
        encode: the VAE. size: of the clip.
        control: [3, frames, height, width] in [-1, 1], edges, depth or poses frame by frame; None for none.
        start: [3, height, width] in [-1, 1], the clip's first frame; None for none.
        channels: C, where nothing is given.

    Returns:
        [2 C, F, H, W] in the VAE's precision: the control video's latents, then those of the start image. Zeros stand
        for what is not given; where nothing is, they are fp32 on the CPU.

    Raises:
        ConfigError: CFG-253 for a control video that is shorter than the clip or of another size, CFG-254 for a start
            image of another size or not of RGB, CFG-256 for pixels out of range.
    """
    if control is not None:
        require_video(control, size, "The control video")
    of_control = None if control is None else encode(control.unsqueeze(0))[0]
    of_start = None if start is None else start_condition(encode, size, start)
    given = of_control if of_control is not None else of_start
    zeros = torch.zeros(channels, *size.latent) if given is None else torch.zeros_like(given)
    return torch.cat([zeros if part is None else part for part in (of_control, of_start)])


def start_condition(
    encode: Encode, size: ClipSize, start: Tensor | None = None, channels: int = LATENT_CHANNELS
) -> Tensor:
    """Channels behind the noisy latents of a Control-Camera model, and the second half of a Fun-Control model's.

    Args:
        encode: the VAE. size: of the clip. start: [3, height, width] in [-1, 1], the clip's first frame; None for none.
        channels: C, where nothing is given.

    Returns:
        [C, F, H, W] in the VAE's precision: the image's latents in the first latent frame, exact zeros behind.

    Raises:
        ConfigError: CFG-254 for an image of another size or not of RGB, CFG-256 for pixels out of range.
    """
    if start is None:
        return torch.zeros(channels, *size.latent)
    return in_first_frame(image_latents(encode, start, size, "The start image")[:, 0], size.latent[0])


def in_first_frame(latents: Tensor, num_latent_frames: int) -> Tensor:
    """Latents of one image, [C, H, W], in the first latent frame and zeros behind, [C, F, H, W]."""
    return torch.cat(
        (latents.unsqueeze(1), latents.new_zeros(len(latents), num_latent_frames - 1, *latents.shape[1:])), 1
    )


def reference_latents(
    encode: Encode, size: ClipSize, reference: Tensor | None = None, channels: int = LATENT_CHANNELS
) -> Tensor:
    """Latents of the reference image of a Fun-V1.1-Control model, which become tokens before the video's.

    Args:
        encode: the VAE. size: of the clip. reference: [3, height, width] in [-1, 1], at the clip's size; None for none.
        channels: C, where nothing is given.

    Returns:
        [C, H, W] in the VAE's precision; zeros (fp32 on the CPU) without a reference, which make tokens too, as these
        models were trained and as VideoX-Fun does. DiffSynth-Studio leaves the tokens out.

    Raises:
        ConfigError: CFG-254 for an image of another size or not of RGB, CFG-256 for pixels out of range.
    """
    if reference is None:
        return torch.zeros(channels, *size.latent[1:])
    return image_latents(encode, reference, size, "The reference image")[:, 0]
