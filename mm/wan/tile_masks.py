"""Encoding and decoding in overlapping tiles that are weighted by masks: the result is their weighted mean.

The mask of a tile is 1 and falls linearly over what it shares with a neighbour; at corners the lower of both axes
counts. Nothing but the sums and one tile is held at a time.

Source: the tiled VAE of DiffSynth-Studio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm.config.run.encoders import Tiles
from mm.wan.tiles import fade, origins


def in_masked_tiles(apply: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiles, units: tuple[int, int]) -> Tensor:
    """Apply a half of the VAE to tiles, and take the mean of what overlaps.

    Args:
        apply: from [B, C, F, h, w] to [B, C', F', h', w'], for tiles of any size.
        x: [B, C, F, H, W].
        tiling: sizes in latent pixels.
        units: elements of `x` and of the result to a latent pixel, along height and width.

    Returns:
        [B, C', F', H', W'] in the dtype of `apply`'s results; sums are fp32.
    """
    before, after = units
    height, width = (side // before for side in x.shape[-2:])
    total, weights = None, torch.zeros(height * after, width * after, device=x.device)
    for top in origins(height, tiling.size[0], tiling.stride[0]):
        for left in origins(width, tiling.size[1], tiling.stride[1]):
            bottom, right = min(top + tiling.size[0], height), min(left + tiling.size[1], width)
            tile = apply(x[..., top * before : bottom * before, left * before : right * before])
            mask = tile_mask((top, bottom, height), (left, right, width), tiling, after).to(x.device)
            if total is None:
                total = torch.zeros(*tile.shape[:-2], *weights.shape, device=x.device)
            where = (..., slice(top * after, bottom * after), slice(left * after, right * after))
            total[where] += tile * mask
            weights[where] += mask
            dtype = tile.dtype
            del tile  # before the next one is made
    assert total is not None  # noqa: S101  there is a tile at (0, 0)
    return (total / weights).to(dtype)


def tile_mask(rows: tuple[int, int, int], columns: tuple[int, int, int], tiling: Tiles, unit: int) -> Tensor:
    """Weights of a tile, [h, w] fp32.

    Args:
        rows, columns: first latent pixel of it, the one behind its last, and how many the picture has, of each axis.
        tiling: sizes in latent pixels. unit: elements to a latent pixel.
    """
    axes = []
    for (start, end, length), size, stride in zip((rows, columns), tiling.size, tiling.stride, strict=True):
        border = (size - stride) * unit
        axes.append(fade((end - start) * unit, border, 1, begins=start > 0, ends=end < length))
    return torch.minimum(axes[0][:, None], axes[1][None, :])
