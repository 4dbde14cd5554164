"""A picture of any size on a white canvas of a clip's, as models are shown references.

Source: Wan2.1's own VACE and diffusers' pipeline.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def white_canvas(image: Tensor, height: int, width: int) -> Tensor:
    """An image in the middle of a white one, as large as it fits with its aspect kept.

    It is resized bilinearly, without antialiasing, as Wan2.1 and diffusers do; one of the canvas's size is as it was.

    Args:
        image: [3, any height, any width] in [-1, 1]. height, width: to come out.

    Returns:
        [3, height, width].
    """
    rows, columns = image.shape[1:]
    if (rows, columns) == (height, width):
        return image
    if height * columns <= width * rows:  # its height fills the canvas
        inner = height, max(columns * height // rows, 1)
    else:
        inner = max(rows * width // columns, 1), width
    resized = F.interpolate(image.unsqueeze(0), inner, mode="bilinear", align_corners=False)[0]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas = image.new_ones(3, height, width)
    canvas[:, top : top + inner[0], left : left + inner[1]] = resized
    return canvas
