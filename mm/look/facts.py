"""Facts that a page about training data shows: values without markup; `collect.py` makes, `page.py` shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""[height, width, 3], RGB."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame that is shown: its pixels, at the size that they were made in, and what it is."""

    pixels: Picture
    label: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Some frames of a sample's clip, or of what the task has beside it.

    Attributes:
        title: of the strip. frames: first to last. note: what else is to be known.
    """

    title: str
    frames: Sequence[Frame]
    note: str = ""


@dataclass(frozen=True)
class LookedSample:
    """One sample at its place in a micro-batch.

    Attributes:
        id: the sample's. store: where its features are. video: its source, as it was listed.
        caption: as the model gets it, cleaned; None where it is not listed.
        without_caption: the empty caption takes its place. text_tokens, cut_at: its tokens, and after how many the
            recipe cuts.
        size: frames, height and width in pixels. latent_shape: C, F, H, W. tokens: of the transformer.
        cost: operations of the model's blocks in one forward. draw: how often the sample came before.
        window: which frames of the source it has, in words.
        strips: its pictures. numbers: features that are numbers, by title.
    """

    id: str
    store: str
    video: str
    caption: str
    without_caption: bool
    text_tokens: int
    cut_at: int
    size: tuple[int, int, int]
    latent_shape: tuple[int, int, int, int]
    tokens: int
    cost: float
    draw: int
    window: str
    strips: Sequence[Strip]
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LookedBatch:
    """One micro-batch.

    Attributes:
        step, number, count: the step, counted from 1, its how-manieth micro-batch of how many.
        replica: that computes it; None where there is one.
        source: of the mixture; empty where samples of several may share it. samples: in their order.
        replaced: ids in whose place others stand. budget: tokens of a sequence that its samples share, or None.
    """

    step: int
    number: int
    count: int
    replica: int | None
    source: str
    samples: Sequence[LookedSample]
    replaced: Sequence[str]
    budget: int | None = None

    @property
    def tokens(self) -> int:
        """Transformer tokens of all its samples."""
        return sum(sample.tokens for sample in self.samples)


@dataclass(frozen=True, slots=True)
class BucketRow:
    """Samples of one shape of one source.

    Attributes:
        source: name. size: frames, height and width in pixels. samples, tokens, cost: how many, and of each.
        share_of_samples, share_of_cost: of all that is trained on; 0 where it is left out.
        micro_batches: of one pass, with the part that is left over.
        left_out: it has fewer samples than a micro-batch.
    """

    source: str
    size: tuple[int, int, int]
    samples: int
    tokens: int
    cost: float
    share_of_samples: float
    share_of_cost: float
    micro_batches: float
    left_out: bool


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One source of the mixture.

    Attributes:
        name: its store. samples: that it has. asked: its share, as it was asked for, in words.
        share: of the micro-batches. passes: how often each of its samples is trained on.
    """

    name: str
    samples: int
    asked: str
    share: float
    passes: float


@dataclass(frozen=True)
class Histogram:
    """Counts by a value.

    Attributes:
        title: what is counted. bars: (value, count), in the order of the values. note: of what they are.
    """

    title: str
    bars: Sequence[tuple[str, int]]
    note: str = ""


@dataclass(frozen=True)
class Skipped:
    """Clips that extraction left out of one store: how many by error id, and the first of them (id, error, reason)."""

    store: str
    by_error: Mapping[str, int]
    first: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Looked:
    """All that one page shows.

    Attributes:
        title: what was looked at. facts: of the run, (name, value). decoded_by: the VAE; None where latents are shown
            as false colours. warnings: what a user must know.
        batches: the first ones. sources, buckets, histograms: of all samples; `stretch` says over which stretch of
            training shares are counted.
        skipped: of the stores that left clips out. small: what becomes of shapes with few samples, in words.
        recipes: of each store, (name, value).
    """

    title: str
    facts: Sequence[tuple[str, str]]
    decoded_by: str | None
    warnings: Sequence[str]
    batches: Sequence[LookedBatch]
    stretch: str
    sources: Sequence[SourceRow]
    buckets: Sequence[BucketRow]
    histograms: Sequence[Histogram]
    skipped: Sequence[Skipped]
    small: str
    recipes: Sequence[tuple[str, Sequence[tuple[str, str]]]]
