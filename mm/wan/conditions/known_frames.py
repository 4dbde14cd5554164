"""Condition of image-to-video models on the frames that are given: a mask and the latents of a video of those frames.

Wan2.1's I2V and FLF2V have it, Wan2.2's I2V-A14B and, of frames, Fun-InP.

Shapes: B batch, C latent channels, F H W latent frames, height and width.
Source: Wan technical report (arXiv 2503.20314) section 5.1 and the released code (wan/image2video.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mm.wan.conditions.pixels import Encode, group_frames


def condition_latents(encode: Encode, known: Mapping[int, Tensor], num_frames: int) -> Tensor:
    """The feature `mm.config.tasks.task.Source.KNOWN_FRAMES` of clips with given frames.

    Args:
        encode: the VAE of the latents.
        known: [B, 3, height, width] in [-1, 1] by their index in the clips, the first (0) and perhaps the last (-1).
        num_frames: of the clips, 4k + 1.

    Returns:
        [B, 4 + C, F, H, W] in the VAE's precision: the mask, then the latents.

    Raises:
        ConfigError: CFG-255 for a number of frames that is not 4k + 1.
        DataError: DATA-044, see `mm.wan.encoders.VideoEncoder.encode`.
    """
    mask = known_frames_mask(num_frames, known)
    latents = encode(_video_of(known, num_frames))
    spread = mask.to(latents).view(1, *mask.shape, 1, 1).expand(len(latents), -1, -1, *latents.shape[3:])
    return torch.cat((spread, latents), dim=1)


def known_frames_mask(num_frames: int, indices: Iterable[int]) -> Tensor:
    """Mask of the frames that are given, [4, F] fp32: 1 known, 0 to generate.

    A latent frame stands for 4 frames, one a channel; the first one for the first frame alone, four times.
    """
    known = torch.zeros(num_frames)
    for index in indices:
        known[index] = 1
    return group_frames(known).t()


def _video_of(known: Mapping[int, Tensor], num_frames: int) -> Tensor:
    """[B, 3, num_frames, height, width]: the given frames, and mid-grey (0) where there is none."""
    first = next(iter(known.values()))
    video = first.new_zeros(*first.shape[:2], num_frames, *first.shape[2:])
    for index, frames in known.items():
        video[:, :, index] = frames
    return video
