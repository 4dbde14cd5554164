"""Rotary position angles of a Wan token grid: three axes share the width of a head.

Source: Wan technical report (arXiv 2503.20314) section 4.2 and the released weights; Su et al. 2021 for the rotation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.device.copies import to_device
from mm.ops.attention.segments import Segments
from mm.wan.packed import PackedTokens, joined

THETA = 10_000.0

Grid = tuple[int, int, int]
"""Tokens along frames, rows and columns: latent (F, H, W) divided by the patch size."""


@dataclass(frozen=True)
class Positions:
    """Positions of the tokens at hand, as angles.

    Attributes:
        cos, sin: [T, K/2] fp32, the rotary tables of the tokens at hand.
        segments: the samples of the sequence with all of their tokens, more than T where ranks share a sequence; one
            where each row of the batch is a sample.
        packed: whose the tokens at hand are, where there are several samples; else None.
        runs: tokens of the residual stream at hand that share a timestep, as `mm.wan.packed.by_run` takes them.
    """

    cos: Tensor
    sin: Tensor
    segments: Segments
    packed: PackedTokens | None = None
    runs: tuple[int, ...] | None = None


def grid_positions(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> Positions:
    """Positions of a whole sample; arguments as in `rope_tables`."""
    return Positions(*rope_tables(grid, head_dim, device), Segments.whole([math.prod(grid)]))


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Split of K over frames, rows and columns: 44/42/42 for K = 128. Frames take what does not divide by six."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_tables(grid: Grid, head_dim: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token, tokens in row-major order of (frame, row, column), positions from 0.

    Args:
        grid: tokens along (frames, rows, columns), T = their product.
        head_dim: K.
        device: where the tables go.

    Returns:
        cos, sin: [T, K/2] fp32, one column for each pair.
    """
    return _broadcast(_axis_tables(grid, head_dim, device), grid)


class RotaryTables:
    """`rope_tables` for one head width, which computes the angles of a grid once.

    Kept on the device are the rows of each axis, F + H + W of them, some ten kilobytes; the tables are their broadcast,
    one write of the device's memory each time. So a step moves no angle, and large tables live no longer than a pass.
    """

    _MOST = 64  # grids; runs have a few, and generation of many sizes must not fill the device

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim
        self._axes: dict[tuple[Grid, torch.device], list[tuple[Tensor, Tensor]]] = {}

    def tables(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines as `rope_tables` gives them."""
        key = (grid, device)
        axes = self._axes.pop(key, None) or _axis_tables(grid, self._head_dim, device)
        self._axes[key] = axes  # the last one used is last
        if len(self._axes) > self._MOST:
            self._axes.pop(next(iter(self._axes)))
        return _broadcast(axes, grid)

    def positions(
        self,
        grids: Sequence[Grid],
        device: torch.device,
        packed: PackedTokens | None = None,
        runs: tuple[int, ...] | None = None,
    ) -> Positions:
        """Positions of whole samples, each from its own origin, one after the other."""
        cos, sin = zip(*(self.tables(grid, device) for grid in grids), strict=True)
        segments = Segments.whole([math.prod(grid) for grid in grids])
        return Positions(joined(cos, 0), joined(sin, 0), segments, packed, runs)


def _axis_tables(grid: Grid, head_dim: int, device: torch.device | str) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines of the positions along each axis, [size, width/2] fp32 each."""
    # fp64, because an fp32 angle of some hundred radians has lost the digits that its cosine needs.
    angles = [_axis_angles(size, width) for size, width in zip(grid, axis_widths(head_dim), strict=True)]
    return [(to_device(a.cos().float(), device), to_device(a.sin().float(), device)) for a in angles]


def _axis_angles(size: int, width: int) -> Tensor:
    """[size, width/2] fp64: position times theta^(-2i/width)."""
    # max(): a width of zero (heads narrower than six) has no frequencies, but the exponent must still be a number.
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / max(width, 1)
    return torch.outer(torch.arange(size, dtype=torch.float64), THETA**-exponent)


def _broadcast(axes: list[tuple[Tensor, Tensor]], grid: Grid) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token from those along the axes."""

    def whole(tables: list[Tensor]) -> Tensor:
        frames, rows, columns = tables
        along = frames[:, None, None, :], rows[None, :, None, :], columns[None, None, :, :]
        return torch.cat([table.expand(*grid, -1) for table in along], dim=-1).flatten(0, 2)

    return whole([cos for cos, _ in axes]), whole([sin for _, sin in axes])
