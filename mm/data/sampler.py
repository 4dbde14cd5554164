"""Order of samples: a function of the seed and the position alone.

Training walks along positions 0, 1, 2, ... without end. Epoch e is the positions e * n .. (e + 1) * n - 1 in an order
of its own. Global batch g takes the next `global_batch_size` positions after those consumed before; how it is dealt to
replicas and micro-batches changes who computes a sample, never which samples a step sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mm.errors import ConfigError
from mm.rng import generator


def epoch_order(epoch: int, num_samples: int, seed: int, shuffle: bool = True) -> list[int]:
    """The samples of one epoch in order."""
    if not shuffle:
        return list(range(num_samples))
    order = torch.randperm(num_samples, generator=generator(seed, "sample_order", "epoch", epoch))
    return [int(index) for index in order]


def sample_at(position: int, num_samples: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
    """The (sample index, epoch) at a position of the endless walk."""
    epoch, place = divmod(position, num_samples)
    return epoch_order(epoch, num_samples, seed, shuffle)[place], epoch


def next_in_epoch(index: int, epoch: int, num_samples: int, seed: int, shuffle: bool = True) -> int:
    """The sample that follows `index` in an epoch's order; the first one follows the last."""
    order = epoch_order(epoch, num_samples, seed, shuffle)
    return order[(order.index(index) + 1) % num_samples]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Distribution of global batches over replicas and micro-batches.

    Attributes:
        global_batch_size: samples of one optimizer step over all replicas.
        micro_batch_size: samples of one forward of one replica.
        dp_rank, dp_size: this replica and how many there are.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1

    def __post_init__(self) -> None:
        step = self.micro_batch_size * self.dp_size
        if self.global_batch_size % step or not 0 <= self.dp_rank < self.dp_size:
            raise ConfigError(
                "CFG-021",
                f"Global batch {self.global_batch_size} is not a multiple of micro-batch {self.micro_batch_size} x "
                f"{self.dp_size} replicas (replica {self.dp_rank}).",
                "Choose a global batch size that is.",
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one replica in one global batch."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def positions(self, consumed_samples: int) -> Iterator[range]:
        """This replica's micro-batches without end, each a range of positions, after `consumed_samples`.

        Micro-batch m of replica r takes the positions m * dp * mbs + r * mbs and on of its global batch.
        """
        while True:
            for micro_batch in range(self.num_micro_batches):
                first = (micro_batch * self.dp_size + self.dp_rank) * self.micro_batch_size + consumed_samples
                yield range(first, first + self.micro_batch_size)
            consumed_samples += self.global_batch_size


class MicroBatchSampler:
    """Iterable of this replica's micro-batches, each a list of (sample index, epoch)."""

    def __init__(self, plan: BatchPlan, num_samples: int, seed: int, consumed_samples: int, shuffle: bool) -> None:
        self._plan = plan
        self._num_samples = num_samples
        self._seed = seed
        self._consumed_samples = consumed_samples
        self._shuffle = shuffle

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known_epoch, order = -1, list[int]()  # of the epoch last asked for, since a permutation costs O(n)
        for positions in self._plan.positions(self._consumed_samples):
            batch = []
            for position in positions:
                epoch, place = divmod(position, self._num_samples)
                if epoch != known_epoch:
                    known_epoch, order = epoch, epoch_order(epoch, self._num_samples, self._seed, self._shuffle)
                batch.append((order[place], epoch))
            yield batch
