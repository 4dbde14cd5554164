"""Steps of one replica: micro-batches of samples of one shape, or of samples of any shapes packed into sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from mm.data.dataset import FeatureDataset
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.packed import MicroBatch, pack
from mm.data.packing import PackSizes
from mm.data.sampler import BatchPlan


@dataclass(frozen=True)
class StepBatches:
    """One replica's part of a step.

    Attributes:
        batches: its micro-batches, as many on every replica.
        most_samples: of the micro-batch of any replica that has most.
    """

    batches: list[MicroBatch]
    most_samples: int


def step_batches(dataset: FeatureDataset, plan: BatchPlan, **options: Any) -> Generator[StepBatches]:
    """This replica's steps without end.

    Args:
        dataset: the features. plan: sizes of batches, packs and this replica's place.
        options: the others of `feature_batches`.

    Raises:
        ConfigError, DataError: what `feature_batches` raises, at once or while iterating.
    """
    sizes: deque[PackSizes] = deque()
    batches = feature_batches(dataset, plan, sizes=sizes, **options)
    return _whole(batches, plan.num_micro_batches) if plan.pack_tokens is None else _packed(batches, sizes)


def _whole(batches: Generator[FeatureBatch], of_step: int) -> Generator[StepBatches]:
    try:
        while True:
            mine: list[MicroBatch] = [next(batches) for _ in range(of_step)]
            yield StepBatches(mine, len(mine[0]["sample"]))
    finally:
        batches.close()


def _packed(samples: Generator[FeatureBatch], sizes: deque[PackSizes]) -> Generator[StepBatches]:
    try:
        while True:
            waiting = next(samples)  # after which its step's sizes are there
            of_step = sizes.popleft()
            sequences: list[MicroBatch] = []
            for number, size in enumerate(of_step.mine):
                first = [waiting] if number == 0 else []
                sequences.append(pack([*first, *(next(samples) for _ in range(size - len(first)))]))
            yield StepBatches(sequences, of_step.most)
    finally:
        samples.close()
