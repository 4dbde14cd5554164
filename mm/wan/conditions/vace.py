"""Context of VACE models: what is to stay and what is to change of a video, the mask between them, and references.

Source: Wan2.1's own VACE and diffusers' pipeline, which splits the video by the mask at 0.5, keeps the
mask's own values in the mask's channels, and keeps what the video has where the mask is 1: an outline to follow may be
there. Where nothing may be seen there, as in training on a clip that is also the target, `blanked` comes first;
VideoX-Fun does that to a `video`, and not to a `control_video`. DiffSynth-Studio splits by the grey values themselves.

Shapes: C latent channels, F H W latent frames, height and width, R references.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.canvas import white_canvas
from mm.config.data import LATENT_PIXELS
from mm.wan.conditions.pixels import ClipSize, Encode, binarised, require_image, require_mask, require_video


def vace_context(
    encode: Encode,
    size: ClipSize,
    video: Tensor | None = None,
    mask: Tensor | None = None,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Input of a VACE model's side branch.

    Args:
        encode: the VAE. size: of the clip.
        video: [3, frames, height, width] in [-1, 1]; None for grey, of which nothing stays.
        mask: [frames, height, width], above 0.5 where the video is to change; None for everywhere.
        references: [3, any height, any width] in [-1, 1] each.

    Returns:
        [2 C + 64, R + F, H, W] in the VAE's precision: latents of what stays, latents of what changes, 64 mask channels
        (`mask_channels`). Each reference is a latent frame in front, in their order: its latents, zeros, zeros.
        The noisy latents get R frames in front, too, which are dropped before decoding.

    Raises:
        ConfigError: CFG-252 for a mask and CFG-253 for a video of another size than the clip, CFG-254 for a reference
            that is not of RGB, CFG-256 for numbers out of range.
    """
    if video is None:
        video = torch.zeros(3, size.frames, size.height, size.width)
    if mask is None:
        mask = video.new_ones(size.frames, size.height, size.width)
    require_video(video, size, "The video")
    require_mask(mask, size)
    for number, reference in enumerate(references, start=1):
        require_image(reference, f"Reference image {number}")
    changes = binarised(mask)
    latents = [encode(part.unsqueeze(0))[0] for part in (video * (1 - changes), video * changes)]
    context = torch.cat((*latents, mask_channels(mask).to(latents[0])))
    zeros = (0, 0, 0, 0, 0, 0, 0, len(context) - len(latents[0]))
    in_front = [F.pad(frame_in_front(encode, size, reference), zeros) for reference in references]
    return torch.cat((*in_front, context), dim=1)


def blanked(video: Tensor, mask: Tensor) -> Tensor:
    """A video with grey where it is to change.

    Args:
        video: [3, frames, height, width] in [-1, 1]. mask: [frames, height, width], above 0.5 where it is to change.
    """
    return video * (1 - binarised(mask))


def mask_channels(mask: Tensor) -> Tensor:
    """Every pixel of a mask at latent size, its values as they are.

    Args:
        mask: [frames, height, width], 4k + 1 frames.

    Returns:
        [64, F, H, W]: channel 8 y + x is the pixel in row y and column x of each 8x8. Latent frame i takes the frame
        nearest to the middle of its share of the frames, (i + 0.5) frames / F rounded down: 1, 4 and 7 of 9 frames.
    """
    tall, wide = (side // LATENT_PIXELS for side in mask.shape[1:])
    pixels = mask.view(-1, tall, LATENT_PIXELS, wide, LATENT_PIXELS).permute(2, 4, 0, 1, 3).flatten(0, 1)
    num_frames = len(mask)
    num_latent_frames = (num_frames + 3) // 4
    nearest = [(2 * i + 1) * num_frames // (2 * num_latent_frames) for i in range(num_latent_frames)]
    return pixels[:, nearest]


def frame_in_front(encode: Encode, size: ClipSize, image: Tensor) -> Tensor:
    """Latents [C, 1, H, W] of a reference [3, any height, any width] in [-1, 1]: the frame in front of the clip's."""
    return encode(white_canvas(image, size.height, size.width)[None, :, None])[0]
