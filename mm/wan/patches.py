"""Latents cut into tokens and put together again. Shapes: B batch, C channels, F H W latent size, T tokens."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from mm.errors import ConfigError
from mm.wan.rope import Grid

Size = tuple[int, int, int]
"""F, H, W of latents, or of a patch."""


def token_grid(latent_size: Size, patch_size: Size) -> Grid:
    """Tokens along (frames, rows, columns) of a latent of size (F, H, W).

    Raises:
        ConfigError: CFG-040 when a side is not a positive multiple of its patch side.
    """
    if any(size < 1 or size % patch for size, patch in zip(latent_size, patch_size, strict=True)):
        raise ConfigError(
            "CFG-040",
            f"Latents of size (F, H, W) = {latent_size} do not divide into patches of {patch_size}.",
            "Choose a height and width in pixels that are multiples of 16 (8 for the VAE times 2 for the patch).",
        )
    frames, rows, columns = (size // patch for size, patch in zip(latent_size, patch_size, strict=True))
    return frames, rows, columns


def patchify(latents: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, C, F, H, W] to [B, T, pt*ph*pw*C]: tokens row major, the channel fastest inside a token.

    This is the layout of the head's output, so a loss on tokens equals the loss on latents.

    Raises:
        ConfigError: CFG-040 from `token_grid`.
    """
    batch, channels, *size = latents.shape
    (pt, ph, pw), (f, h, w) = patch_size, token_grid((size[0], size[1], size[2]), patch_size)
    patches = latents.reshape(batch, channels, f, pt, h, ph, w, pw).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return patches.reshape(batch, f * h * w, pt * ph * pw * channels)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: tuple[int, int, int]) -> Tensor:
    """[B, T, pt*ph*pw*C] to [B, C, F, H, W], the inverse of `patchify`."""
    batch, _, width = tokens.shape
    (pt, ph, pw), (f, h, w) = patch_size, grid
    channels = width // math.prod(patch_size)
    patches = tokens.reshape(batch, f, h, w, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return patches.reshape(batch, channels, f * pt, h * ph, w * pw)


def window(x: Tensor, dim: int, start: int, places: int) -> Tensor:
    """`places` rows of a dim from `start` on; those that `x` does not have are zeros."""
    if start == 0 and places == x.shape[dim]:
        return x
    start = min(start, x.shape[dim])
    part = x.narrow(dim, start, min(places, x.shape[dim] - start))
    missing = places - part.shape[dim]
    if missing == 0:
        return part
    return F.pad(part, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])
