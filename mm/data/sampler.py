"""Micro-batches of one replica: the sampling plan's groups (`mm.data.plan`), dealt to replicas.

Global batch k takes the plan's groups after those consumed before. Who computes which of them depends on the layout and
on what they cost; which samples a step sees does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, count

from mm.data.balance import deal
from mm.data.plan import PlannedSample, SamplingPlan
from mm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Distribution of global batches over replicas and micro-batches.

    Attributes:
        global_batch_size: samples of one optimizer step over all replicas, where all micro-batches have as many.
        micro_batch_size: samples of one forward of one replica, where its source says no other number.
        dp_rank, dp_size: this replica and how many there are.
        num_stages: pipeline stages of a replica, for the balance.
        pack_tokens: puts samples into sequences of at most so many tokens, a micro-batch each, instead of
            `micro_batch_size` of one shape beside each other, which is then 1; None for no packs.
        pair_cost: cost of a pair of tokens by that of a token, for the balance; None takes the model's.
        multiple: of which a replica's sequences are a number, as interleaved pipelines ask for.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_rank: int = 0
    dp_size: int = 1
    num_stages: int = 1
    pack_tokens: int | None = None
    pair_cost: float | None = None
    multiple: int = 1

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
        return self.groups_of_step // self.dp_size

    @property
    def groups_of_step(self) -> int:
        """Micro-batches of all replicas in one global batch."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(frozen=True, slots=True)
class DealtStep:
    """One step, dealt to the replicas.

    Attributes:
        sizes: samples of each of this replica's micro-batches. most: of the micro-batch of any replica that has most.
        tokens: transformer tokens of each sample of the step, in all replicas.
    """

    sizes: tuple[int, ...]
    most: int
    tokens: tuple[int, ...]


class MicroBatchSampler:
    """Iterable of this replica's micro-batches, without end where the plan has none."""

    def __init__(
        self,
        plan: SamplingPlan,
        batches: BatchPlan,
        consumed_samples: int,
        cost: Callable[[int], float] | None = None,
        dealt: deque[DealtStep] | None = None,
    ) -> None:
        """Take the plan and where to begin.

        Args:
            plan: whose groups are as large as a micro-batch. batches: how they are dealt.
            consumed_samples: samples that all replicas together trained on before.
            cost: of a sample of so many tokens; None where all micro-batches cost the same. Then micro-batch m of
                replica r is the group m * dp + r of its global batch.
            dealt: gets each step before its first micro-batch comes, behind the steps before.
        """
        self._plan = plan
        self._batches = batches
        self._consumed_samples = consumed_samples
        self._cost = cost
        self._dealt = deque[DealtStep](maxlen=0) if dealt is None else dealt

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        batches = self._batches
        for first in count(self._consumed_samples // batches.micro_batch_size, batches.groups_of_step):
            if self._plan.end is not None and first >= self._plan.end:
                return
            slots = range(first, first + batches.groups_of_step)
            mine: Sequence[int] = range(batches.dp_rank, len(slots), batches.dp_size)
            if self._cost is None:
                tokens = [self._plan.tokens(first)] * len(slots)
            else:
                tokens = [self._plan.tokens(slot) for slot in slots]
                costs = [sum(map(self._cost, of_group)) for of_group in tokens]
                mine = deal(costs, batches.dp_size, batches.num_stages)[batches.dp_rank]
            sizes = tuple(len(tokens[number]) for number in mine)
            self._dealt.append(DealtStep(sizes, max(map(len, tokens)), tuple(chain(*tokens))))
            begins, total = [0, *accumulate(map(len, tokens))], sum(map(len, tokens))
            for number in mine:
                yield in_step(self._plan.group(slots[number]), begins[number], total)


def in_step(group: Sequence[PlannedSample], first: int, total: int) -> list[PlannedSample]:
    """Samples that follow each other in a step of so many, the first of them at this place in it."""
    return [replace(sample, place=(place, total)) for place, sample in enumerate(group, first)]
