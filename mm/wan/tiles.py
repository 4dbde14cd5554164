"""Encoding and decoding in overlapping tiles: diffusers' tiles and blending, without a last tile that is not needed.

diffusers begins a tile at every stride, also where the one before has reached the edge. What is left for that tile is a
strip without surroundings, which replaces what the tile before has made with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from mm.config.run.encoders import Tiles


def origins(length: int, size: int, stride: int) -> list[int]:
    """Starts of tiles of `size` on an axis: every `stride`, up to the first that reaches the end."""
    return [0, *range(stride, max(length - size, 0) + stride, stride)]


def fade(length: int, border: int, first: float, *, begins: bool, ends: bool) -> Tensor:
    """Weights along one axis of a tile, [length] fp32: 1, but rising over its first elements and falling over its last.

    Args:
        length: of the tile, longer than `border`. border: elements that it shares with a neighbour.
        first: the lowest weight is first / border; the others follow in steps of 1 / border.
        begins, ends: it has a neighbour before, and behind. Where both borders meet the one behind is kept.
    """
    weights, rise = torch.ones(length), (torch.arange(border) + first) / max(border, 1)
    if begins:
        weights[:border] = rise
    if ends:
        weights[length - border :] = rise.flip(0)
    return weights


def in_tiles(
    vae: AutoencoderKLWan, apply: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiles, units: tuple[int, int]
) -> Tensor:
    """Apply a half of the VAE to tiles, and blend them linearly where they overlap.

    Args:
        vae: whose blending is used.
        apply: from [B, C, F, h, w] to [B, C', F', h', w'], for tiles of any size.
        x: [B, C, F, H, W].
        tiling: sizes in latent pixels.
        units: elements of `x` and of the result to a latent pixel, along height and width.

    Returns:
        [B, C', F', H', W'].
    """
    (height, width), (down, right) = tiling.size, tiling.stride
    before, after = units
    tops = origins(x.shape[-2] // before, height, down)
    lefts = origins(x.shape[-1] // before, width, right)

    def made(top: int, left: int) -> Tensor:
        return apply(x[..., top * before : (top + height) * before, left * before : (left + width) * before])

    tiles = [[made(top, left) for left in lefts] for top in tops]
    blended = []
    for i, row in enumerate(tiles):
        kept = []
        for j, tile in enumerate(row):
            if i > 0:
                tile = vae.blend_v(tiles[i - 1][j], tile, (height - down) * after)
            if j > 0:
                tile = vae.blend_h(row[j - 1], tile, (width - right) * after)
            until_next = (down * after if i + 1 < len(tops) else None, right * after if j + 1 < len(lefts) else None)
            kept.append(tile[..., : until_next[0], : until_next[1]])
        blended.append(torch.cat(kept, dim=-1))
    return torch.cat(blended, dim=-2)
