"""Steps of one replica: micro-batches of samples of one shape, or of samples of any shapes packed into sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mm.data.dataset import FeatureDataset
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.packed import MicroBatch, pack
from mm.data.sampler import BatchPlan, DealtStep
from mm.ops.attention.segments import consecutive


@dataclass(frozen=True)
class StepBatches:
    """One replica's part of a step.

    Attributes:
        batches: its micro-batches, as many on every replica.
        dealt: how large they are, and the whole step's tokens.
    """

    batches: list[MicroBatch]
    dealt: DealtStep


def step_batches(dataset: FeatureDataset, plan: BatchPlan, **options: Any) -> Generator[StepBatches]:
    """This replica's steps, without end where the plan has none.

    Args:
        dataset: the features. plan: sizes of batches, packs and this replica's place.
        options: the others of `feature_batches`.

    Raises:
        ConfigError, DataError: what `feature_batches` raises, at once or while iterating.
    """
    dealt: deque[DealtStep] = deque()
    batches = feature_batches(dataset, plan, dealt=dealt, **options)
    return _steps(batches, dealt, packed=plan.pack_tokens is not None)


def _steps(batches: Generator[FeatureBatch], dealt: deque[DealtStep], *, packed: bool) -> Generator[StepBatches]:
    with closing(batches):
        for first in batches:
            step = dealt.popleft()
            count = sum(step.sizes) if packed else len(step.sizes)
            read = [first, *islice(batches, count - 1)]
            yield StepBatches([pack(read[rows]) for rows in consecutive(step.sizes)] if packed else [*read], step)
