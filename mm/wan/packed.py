"""Several samples in one sequence, as the blocks of a model meet them: whose tokens are whose.

Shapes: S samples, t tokens of the residual stream at hand, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.ops.attention.segments import Pairs, consecutive


@dataclass(frozen=True)
class PackedTokens:
    """The samples' tokens at hand.

    Attributes:
        counts: tokens of each of the S samples in the residual stream, padding included, one sample after the other;
            0 of one that lies on other ranks.
        text, images: the rows of queries in attention of each sample, with those of its text and of its images; the
            latter without pairs where the model has no images.
    """

    counts: tuple[int, ...]
    text: Pairs
    images: Pairs

    @classmethod
    def of_counts(
        cls, counts: Sequence[int], queries: Sequence[int], text_lengths: Sequence[int], image_tokens: int
    ) -> PackedTokens:
        """Tokens of samples, given their numbers.

        Args:
            counts: in the residual stream. queries: in attention, where sequence-parallel ranks are together.
            text_lengths: of the captions. image_tokens: of a sample.
        """
        rows = consecutive(queries)
        images = consecutive([image_tokens] * len(counts))
        return cls(tuple(counts), Pairs.of_rows(rows, consecutive(text_lengths)), Pairs.of_rows(rows, images))


def by_sample(
    function: Callable[..., Tensor],
    streams: Sequence[Tensor],
    parameters: Sequence[Tensor],
    packed: PackedTokens | None,
) -> Tensor:
    """An elementwise function of tokens, with the parameters of the sample that each belongs to.

    Args:
        function: (*streams, *parameters) -> [B, t, D], of tensors as below.
        streams: [B, t, D]; [1, t, D] where samples share a sequence.
        parameters: [B, 1, D]; [S, 1, D] where samples share a sequence.
        packed: the samples; None where each row of the batch is one.
    """
    if packed is None:
        return function(*streams, *parameters)
    parts = zip(*(x.split(packed.counts, dim=1) for x in streams), strict=True)
    rows = zip(*(value.split(1) for value in parameters), strict=True)
    each = [function(*part, *row) for part, row in zip(parts, rows, strict=True) if part[0].shape[1]]
    return torch.cat(each, dim=1)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts one after the other along a dim; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
