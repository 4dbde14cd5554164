"""Pixels of a video to the tensor a VAE takes; the same for target videos and for what they are conditioned on."""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor

SQUARE = Fraction(1)


def resize_and_crop(frames: Tensor, height: int, width: int, pixel_aspect: Fraction = SQUARE) -> Tensor:
    """Resize frames to cover the size, crop the centre, scale to [-1, 1].

    The picture as it is shown is scaled by one factor, the smaller one that covers `height` x `width` (bilinear, with
    antialiasing when shrinking); what sticks out on the longer side is cut evenly, the odd pixel at the end.

    Args:
        frames: uint8 [F, 3, H, W] in 0..255.
        height: pixels to come out. width: likewise.
        pixel_aspect: width of a pixel of `frames` by its height.

    Returns:
        float32 [F, 3, height, width] in [-1, 1].
    """
    source_height, source_width = frames.shape[-2:]
    shown_width = float(source_width * pixel_aspect)
    scale = max(height / source_height, width / shown_width)
    # max: rounding must never leave a side one pixel short of what the crop takes
    cover = max(height, round(source_height * scale)), max(width, round(shown_width * scale))
    pixels = frames.float()
    if cover != (source_height, source_width):
        pixels = F.interpolate(pixels, size=cover, mode="bilinear", antialias=True, align_corners=False)
    top, left = (cover[0] - height) // 2, (cover[1] - width) // 2
    return pixels[..., top : top + height, left : left + width] / 127.5 - 1
