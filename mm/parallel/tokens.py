"""Division of a sample's tokens over ranks.

The tokens of a sample, in row-major order of their grid, are cut into equal contiguous chunks: first over the
context-parallel ranks, then, with sequence parallelism, each of those chunks over the tensor-parallel ranks. A count
that does not divide is padded at the end; padded tokens never take part in attention between video tokens and are
left out of the loss, so that nothing depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenShare:
    """One rank's share of a sample's tokens.

    Attributes:
        cp_rank, cp_size: along the context-parallel axis.
        sp_rank, sp_size: along the tensor-parallel axis with sequence parallelism; 0 and 1 without.
    """

    cp_rank: int = 0
    cp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1

    def width(self, num_tokens: int) -> int:
        """Tokens, padding included, that each rank holds of a sample of `num_tokens`."""
        return -(-num_tokens // (self.cp_size * self.sp_size))

    def real(self, num_tokens: int) -> int:
        """Number of this rank's tokens that are no padding; they come first."""
        width = self.width(num_tokens)
        start = (self.cp_rank * self.sp_size + self.sp_rank) * width
        return min(max(num_tokens - start, 0), width)

    def take(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of `x`, which has a whole sample's along `dim`; padded with zeros."""
        width = self.width(x.shape[dim])
        return _slice(x, dim, (self.cp_rank * self.sp_size + self.sp_rank) * width, width)

    def take_chunk(self, x: Tensor, dim: int) -> Tensor:
        """The tokens of all sequence-parallel ranks of this context-parallel rank: what attention sees."""
        width = self.width(x.shape[dim]) * self.sp_size
        return _slice(x, dim, self.cp_rank * width, width)


def _slice(x: Tensor, dim: int, start: int, width: int) -> Tensor:
    if start == 0 and width == x.shape[dim]:
        return x
    start = min(start, x.shape[dim])
    part = x.narrow(dim, start, min(width, x.shape[dim] - start))
    missing = width - part.shape[dim]
    if missing == 0:
        return part
    return F.pad(part, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])
