"""Rotary position angles of a Wan token grid: three axes share the width of a head.

Source: Wan technical report (arXiv 2503.20314) section 4.2 and the released weights; Su et al. 2021 for the rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10_000.0

Grid = tuple[int, int, int]
"""Tokens along frames, rows and columns: latent (F, H, W) divided by the patch size."""


@dataclass(frozen=True)
class Positions:
    """Where the tokens at hand are.

    Attributes:
        cos, sin: [T, K/2] fp32, the rotary tables of the tokens at hand.
        num_tokens: tokens of the whole sample; more than T where ranks share a sample.
    """

    cos: Tensor
    sin: Tensor
    num_tokens: int


def grid_positions(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> Positions:
    """Positions of a whole sample; arguments as in `rope_tables`."""
    return Positions(*rope_tables(grid, head_dim, device), num_tokens=math.prod(grid))


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Split of K over frames, rows and columns: 44/42/42 for K = 128. Frames take what does not divide by six."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_tables(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token, tokens in row-major order of (frame, row, column), positions from 0.

    Only the per-axis angles are computed and moved to the device (F + H + W rows); the grid is their broadcast, so a
    call per forward costs one write of the two tables and nothing needs to be cached.

    Args:
        grid: tokens along (frames, rows, columns), T = their product.
        head_dim: K.
        device: where the tables go.

    Returns:
        cos, sin: [T, K/2] fp32, one column for each pair.
    """
    # fp64, because an fp32 angle of some hundred radians has lost the digits that its cosine needs.
    angles = [_axis_angles(size, width) for size, width in zip(grid, axis_widths(head_dim), strict=True)]
    cos = _broadcast([a.cos().to(device=device, dtype=torch.float32) for a in angles], grid)
    sin = _broadcast([a.sin().to(device=device, dtype=torch.float32) for a in angles], grid)
    return cos, sin


def _axis_angles(size: int, width: int) -> Tensor:
    """[size, width/2] fp64: position times theta^(-2i/width)."""
    # max(): a width of zero (heads narrower than six) has no frequencies, but the exponent must still be a number.
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / max(width, 1)
    return torch.outer(torch.arange(size, dtype=torch.float64), THETA**-exponent)


def _broadcast(tables: list[Tensor], grid: Grid) -> Tensor:
    frames, rows, columns = grid
    parts = (
        tables[0][:, None, None, :].expand(frames, rows, columns, -1),
        tables[1][None, :, None, :].expand(frames, rows, columns, -1),
        tables[2][None, None, :, :].expand(frames, rows, columns, -1),
    )
    return torch.cat(parts, dim=-1).flatten(0, 2)
