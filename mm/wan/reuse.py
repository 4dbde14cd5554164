"""Reuse of what the blocks of a transformer made in an earlier call: the place where callers decide about it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

from torch import Tensor

from mm.wan.layers import Streams


class BlockReuse(Protocol):
    """Reuse of the blocks' results from one call of a transformer to the next.

    Whoever calls several transformers, or one for several parts of a clip, hands each its own (`of`), as the results of
    one mean nothing to another.
    """

    def of(self, part: Hashable) -> BlockReuse:
        """The reuse of a part of what this one is for."""

    def __call__(self, time_modulation: Tensor, streams: Streams, compute: Callable[[], Streams]) -> Streams:
        """The streams behind the blocks.

        Args:
            time_modulation: [R B, 6, D] fp32, of R runs of tokens with one timestep (`mm.wan.model.Conditions`).
            streams: [B, T, D] each, in front of the blocks. compute: runs the blocks on these.
        """
