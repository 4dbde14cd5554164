"""Condition of Fun-InP models: a mask of any pixels of the clip, and the latents of what is known of it.

Source: VideoX-Fun's pipeline and trainer of Fun-InP. Masks of whole frames give what image-to-video has
(`mm.wan.conditions.known_frames`).

Shapes: C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config.data import LATENT_PIXELS, TEMPORAL_STRIDE
from mm.errors import ConfigError
from mm.wan.conditions.pixels import (
    LATENT_CHANNELS,
    ClipSize,
    Encode,
    binarised,
    group_frames,
    require_mask,
    require_video,
)


def inpaint_condition(
    encode: Encode,
    size: ClipSize,
    video: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    nothing_known_is_zero: bool = True,
    channels: int = LATENT_CHANNELS,
) -> Tensor:
    """Channels behind the noisy latents of a Fun-InP model.

    Args:
        encode: the VAE. size: of the clip.
        video: [3, frames, height, width] in [-1, 1]; what the mask leaves to generate is not looked at.
        mask: [frames, height, width], above 0.5 where pixels are to be generated. Video and mask, or neither.
        nothing_known_is_zero: a mask of all ones makes all channels zero, as the model knows text to video. In training
            this is drawn (`mm.wan.conditions.random_masks.draw_zeroing`).
        channels: C, where nothing is given.

    Returns:
        [4 + C, F, H, W] in the VAE's precision: `mask_channels`, then the latents of the video with grey where pixels
        are to be generated. Zeros (fp32 on the CPU) where neither is given, which is text to video.

    Raises:
        ConfigError: CFG-252 for a mask of another size than the clip, or one of video and mask alone; CFG-253 for a
            video of another size; CFG-256 for numbers out of range.
    """
    if video is None and mask is None:
        return torch.zeros(TEMPORAL_STRIDE + channels, *size.latent)
    if video is None or mask is None:
        given, missing = ("video", "mask") if mask is None else ("mask", "video")
        remedy = f"Give a {missing} of the clip's size too, or neither for text to video."
        raise ConfigError("CFG-252", f"A {given} was given without a {missing}.", remedy)
    require_video(video, size, "The video")
    require_mask(mask, size)
    generated = binarised(mask)
    latents = encode((video * (1 - generated)).unsqueeze(0))[0]
    condition = torch.cat((mask_channels(generated).to(latents), latents))
    return torch.zeros_like(condition) if nothing_known_is_zero and bool(generated.all()) else condition


def mask_channels(mask: Tensor) -> Tensor:
    """The four channels of a mask, 1 where pixels are known and 0 where they are to be generated.

    Each frame is resized by itself, bilinearly and without antialiasing, so that a number is the mean of the 4 pixels
    in the middle of its 8x8. VideoX-Fun resizes trilinearly to as many frames as there are, the first latent frame
    apart, which is the same.

    Args:
        mask: [frames, height, width], 1 where pixels are to be generated, 4k + 1 frames.

    Returns:
        [4, F, H, W]: channel i of a latent frame is the i-th of its four frames; the first frame stands four times.

    Raises:
        ConfigError: CFG-255 for another number of frames.
    """
    latent_size = tuple(side // LATENT_PIXELS for side in mask.shape[1:])
    resized = F.interpolate(1 - mask.unsqueeze(1), latent_size, mode="bilinear", align_corners=False)
    return group_frames(resized[:, 0]).transpose(0, 1)


def kept_frames_mask(size: ClipSize, kept: Iterable[int]) -> Tensor:
    """Mask of a clip of which whole frames are known, [frames, height, width] fp32: 0 in those, 1 in all others.

    Args:
        size: of the clip. kept: indices of the known frames, -1 for the last.

    Raises:
        ConfigError: CFG-252 for a frame that the clip does not have.
    """
    mask = torch.ones(size.frames, size.height, size.width)
    for index in kept:
        if not -size.frames <= index < size.frames:
            message = f"Frame {index} is to be kept of a clip of {size.frames} frames."
            raise ConfigError("CFG-252", message, f"Give frames from 0 to {size.frames - 1}, or -1 for the last.")
        mask[index] = 0
    return mask
