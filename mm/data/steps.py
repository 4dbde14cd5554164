"""The micro-batches of a replica, step by step: samples of one shape beside each other, or packed into sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count

from mm.data.balance import cost_of_model
from mm.data.dataset import FeatureDataset
from mm.data.loader import FeatureBatch
from mm.data.packed import MicroBatch, pack
from mm.data.packing import pack_step
from mm.data.plan import PlannedSample, SamplingPlan
from mm.data.sampler import BatchPlan


@dataclass(frozen=True)
class StepBatches:
    """One replica's part of a step.

    Attributes:
        batches: its micro-batches, as many on every replica.
        most_samples: of the largest micro-batch of all replicas.
    """

    batches: list[MicroBatch]
    most_samples: int


class PackSampler:
    """Iterable of this replica's samples one by one, packed step by step; `sizes` tells how they are to be put together.

    Attributes:
        sizes: of each step that was begun, in order: samples of each of this replica's sequences, and the most that any
            replica's sequence has. Whoever puts them together takes them from the left.
    """

    def __init__(
        self, dataset: FeatureDataset, plan: SamplingPlan, batches: BatchPlan, consumed_samples: int, budget: int
    ) -> None:
        self.sizes: deque[tuple[list[int], int]] = deque()
        self._dataset, self._plan, self._batches = dataset, plan, batches
        self._consumed_samples, self._budget = consumed_samples, budget

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        batches, cost = self._batches, cost_of_model(self._dataset.model)
        for first in count(self._consumed_samples, batches.global_batch_size):
            samples = [self._plan.group(slot)[0] for slot in range(first, first + batches.global_batch_size)]
            tokens = [self._dataset.num_tokens(sample.index) for sample in samples]
            packs = pack_step(
                tokens, self._budget, cost, num_replicas=batches.dp_size, num_stages=batches.num_stages,
                multiple=batches.multiple,
            )  # fmt: skip
            mine = packs[batches.dp_rank]
            most = max(len(sequence) for replica in packs for sequence in replica)
            self.sizes.append(([len(sequence) for sequence in mine], most))
            yield from ([samples[number]] for sequence in mine for number in sequence)


def packed_steps(
    samples: Generator[FeatureBatch], sizes: deque[tuple[list[int], int]]
) -> Generator[StepBatches]:
    """Steps of sequences of samples that were read one by one."""
    try:
        while True:
            first = next(samples)  # which has the sizes of its step told
            counts, most = sizes.popleft()
            waiting = [first]
            sequences: list[MicroBatch] = []
            for size in counts:
                while len(waiting) < size:
                    waiting.append(next(samples))
                sequences.append(pack(waiting))
                waiting = []
            yield StepBatches(sequences, most)
    finally:
        samples.close()


def plain_steps(batches: Generator[FeatureBatch], of_step: int) -> Generator[StepBatches]:
    """Steps of so many micro-batches."""
    try:
        while True:
            mine: list[MicroBatch] = [next(batches) for _ in range(of_step)]
            yield StepBatches(mine, len(mine[0]["sample"]))
    finally:
        batches.close()
