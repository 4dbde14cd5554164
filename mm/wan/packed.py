"""Several samples in one sequence, as the blocks of a model meet them: whose tokens are whose.

Shapes: B batch, S samples, R runs of tokens with one timestep, t tokens of the residual stream at hand, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mm.ops.attention.segments import Pairs, consecutive


class Run(NamedTuple):
    """Consecutive places of one sample.

    Attributes:
        sample: its place in the sequence. start: the token in the first place. places: their number.
        num_tokens: of the whole sample; places behind its last token are padding.
    """

    sample: int
    start: int
    places: int
    num_tokens: int

    @property
    def real(self) -> int:
        """Number of places with a token; they come first."""
        return min(max(self.num_tokens - self.start, 0), self.places)


@dataclass(frozen=True)
class PackedTokens:
    """The samples' tokens at hand.

    Attributes:
        num_samples: S.
        text, images: the rows of queries in attention of each sample, with those of its text and of its images; the
            latter without pairs where the model has no images.
    """

    num_samples: int
    text: Pairs
    images: Pairs

    @classmethod
    def of_counts(cls, queries: Sequence[int], text_lengths: Sequence[int], image_tokens: int) -> PackedTokens:
        """Tokens of samples, given their numbers.

        Args:
            queries: of each sample in attention, where sequence-parallel ranks are together.
            text_lengths: of the captions. image_tokens: of a sample.
        """
        rows = consecutive(queries)
        images = consecutive([image_tokens] * len(queries))
        return cls(len(queries), Pairs.of_rows(rows, consecutive(text_lengths)), Pairs.of_rows(rows, images))


def by_run(
    function: Callable[..., Tensor],
    streams: Sequence[Tensor],
    parameters: Sequence[Tensor],
    runs: Sequence[int] | None,
) -> Tensor:
    """An elementwise function of tokens, with the parameters of the run of tokens that each belongs to.

    A run is of tokens with one timestep: those of a sample in a sequence of several, or a part of a sample's.

    Args:
        function: (*streams, *parameters) -> [B, t, D], of tensors as below.
        streams: [B, t, D].
        parameters: [R B, 1, D], the rows of the first run before those of the second.
        runs: numbers of tokens of the R runs, which may be 0; None for one run.
    """
    if runs is None:
        return function(*streams, *parameters)
    batch = streams[0].shape[0]
    parts = zip(*(x.split(list(runs), dim=1) for x in streams), strict=True)
    rows = zip(*(value.split(batch) for value in parameters), strict=True)
    each = [function(*part, *row) for part, row in zip(parts, rows, strict=True) if part[0].shape[1]]
    return torch.cat(each, dim=1)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts one after the other along a dim; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
