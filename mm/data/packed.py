"""Micro-batches of samples of any shapes, which share one sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

from mm.data.loader import FeatureBatch


class _Notes(TypedDict, total=False):
    """Entries that only some micro-batches have, as in `FeatureBatch`."""

    replaced: list[str]
    place: list[tuple[int, int]]


class PackedBatch(_Notes):
    """One micro-batch of one sequence.

    Attributes:
        sample, draw: of all samples, as in `FeatureBatch`.
        segments: the samples, one in each, in the order of the sequence.
    """

    sample: list[str]
    draw: list[int]
    segments: list[FeatureBatch]


MicroBatch = FeatureBatch | PackedBatch
"""Samples that a step computes at once: of one shape beside each other, or of any shapes one after the other."""


def pack(samples: Sequence[FeatureBatch]) -> PackedBatch:
    """Samples, one in each, as one sequence in this order."""
    packed = PackedBatch(
        sample=[name for sample in samples for name in sample["sample"]],
        draw=[draw for sample in samples for draw in sample["draw"]],
        segments=list(samples),
    )
    replaced = [name for sample in samples for name in sample.get("replaced", [])]
    if replaced:
        packed["replaced"] = replaced
    if all("place" in sample for sample in samples):
        packed["place"] = [place for sample in samples for place in sample["place"]]
    return packed


def segments_of(batch: MicroBatch) -> list[FeatureBatch]:
    """The samples of a packed micro-batch in the order of its sequence, or the whole of another."""
    return cast(PackedBatch, batch)["segments"] if is_packed(batch) else [cast(FeatureBatch, batch)]


def is_packed(batch: MicroBatch) -> bool:
    """Tell whether the samples of a micro-batch share a sequence."""
    return "segments" in batch
