"""Pixels of a video to the tensor a VAE takes; the same for target videos and for what they are conditioned on."""

from __future__ import annotations

from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor

from mm.data.shapes.fixed import fixed_shape
from mm.data.shapes.shape import Shape

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
    return to_shape(
        frames, fixed_shape(source_height, float(source_width * pixel_aspect), (height, width), len(frames))
    )


def to_shape(frames: Tensor, shape: Shape) -> Tensor:
    """Resize frames, crop the shape's box, scale to [-1, 1].

    Args:
        frames: uint8 [F, 3, H, W] in 0..255. shape: its size, the size to resize to, and the box.

    Returns:
        float32 [F, 3, height, width] in [-1, 1].
    """
    pixels = frames.float()
    if shape.cover != tuple(frames.shape[-2:]):
        pixels = F.interpolate(pixels, size=shape.cover, mode="bilinear", antialias=True, align_corners=False)
    top, left = shape.corner
    return pixels[..., top : top + shape.height, left : left + shape.width] / 127.5 - 1
