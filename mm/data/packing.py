"""Packs: the samples of a step dealt to sequences of a token budget, and these to replicas."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import count

from mm.data.balance import SequenceCost, deal, least_time, replica_time
from mm.data.dataset import FeatureDataset
from mm.data.files import raise_limited
from mm.data.plan import PlannedSample, SamplingPlan
from mm.data.sampler import BatchPlan, DealtStep, in_step
from mm.errors import Problem

_CLOSE = 1.02
"""Of the slowest replica's time to the least that it can be: nearer ones gain little from more sequences."""


class PackSampler:
    """Iterable of this replica's samples, one by one, in the order of its sequences; as `MicroBatchSampler`."""

    def __init__(
        self,
        plan: SamplingPlan,
        batches: BatchPlan,
        consumed_samples: int,
        budget: int,
        cost: SequenceCost,
        dealt: deque[DealtStep] | None = None,
    ) -> None:
        """Take the plan and where to begin.

        Args:
            plan: of samples one by one. batches: how they are dealt.
            consumed_samples: samples that all replicas together trained on before.
            budget: tokens of a sequence. cost: of a sample.
            dealt: gets each step before its first sample comes, behind the steps before.
        """
        self._plan, self._batches, self._consumed_samples = plan, batches, consumed_samples
        self._budget, self._cost, self._dealt = budget, cost, deque[DealtStep](maxlen=0) if dealt is None else dealt

    def __iter__(self) -> Iterator[list[PlannedSample]]:
        batches = self._batches
        for first in count(self._consumed_samples, batches.global_batch_size):
            if self._plan.end is not None and first >= self._plan.end:
                return
            tokens = [self._plan.tokens(slot)[0] for slot in range(first, first + batches.global_batch_size)]
            packs = pack_step(
                tokens,
                self._budget,
                self._cost,
                num_replicas=batches.dp_size,
                num_stages=batches.num_stages,
                multiple=batches.multiple,
            )
            mine = packs[batches.dp_rank]
            most = max(len(sequence) for replica in packs for sequence in replica)
            self._dealt.append(DealtStep(tuple(map(len, mine)), most, tuple(tokens)))
            for number in (number for sequence in mine for number in sequence):
                yield in_step(self._plan.group(first + number), number, len(tokens))


def pack_step(
    num_tokens: Sequence[int],
    budget: int,
    cost: SequenceCost,
    *,
    num_replicas: int,
    num_stages: int = 1,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Pack the samples of one step into few sequences, as many for each replica, each of at most `budget` tokens.

    The dearest sample goes first, each into the sequence that costs least so far among those with room for it (Graham
    1969, as `mm.data.balance.deal`). Where one finds no room, every replica gets more sequences, a quarter more each
    time, until the slowest replica takes no more than `_CLOSE` times what it must (`mm.data.balance.least_time`). Where
    nothing comes so close, as few are taken as come that close to the best of all. One sample in each is the most that
    it takes, which is why samples must fill all replicas alike.

    Args:
        num_tokens: of each sample, none above the budget; as many as a multiple of replicas x `multiple`.
        budget: tokens of a sequence, without padding. cost: of a sample; those of a sequence add up.
        num_replicas: replicas. num_stages: of the pipeline. multiple: of which a replica's sequences are a number.

    Returns:
        For each replica its sequences in the order that it takes them in, each with the numbers of its samples.
    """
    order = sorted(range(len(num_tokens)), key=lambda number: -num_tokens[number])
    of_sample = [cost(number) for number in num_tokens]
    bound, most = least_time(of_sample, num_replicas, num_stages), len(num_tokens) // num_replicas
    least = -(-sum(num_tokens) // (budget * num_replicas))
    of_replica = -(-least // multiple) * multiple
    found: list[tuple[float, list[list[list[int]]]]] = []
    while of_replica <= most:
        packs = _packed(order, num_tokens, budget, of_sample, of_replica * num_replicas)
        if packs is not None:
            costs = [sum(of_sample[number] for number in pack) for pack in packs]
            dealt = deal(costs, num_replicas, num_stages)
            slowest = max(replica_time([costs[which] for which in own], num_stages) for own in dealt)
            found.append((slowest, [[sorted(packs[which]) for which in own] for own in dealt]))
            if slowest <= _CLOSE * bound:
                break
        more = max(multiple, of_replica // 4 // multiple * multiple)
        of_replica = min(of_replica + more, most) if of_replica < most else most + 1
    best = min(slowest for slowest, _ in found)
    close = _CLOSE * (bound if best <= _CLOSE * bound else best)
    return next(packs for slowest, packs in found if slowest <= close)


def _packed(
    order: Sequence[int], num_tokens: Sequence[int], budget: int, of_sample: Sequence[float], count: int
) -> list[list[int]] | None:
    """So many sequences; None where a sample finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    cheapest = [(0.0, which) for which in range(count)]  # a heap
    for number in order:
        passed: list[tuple[float, int]] = []
        while cheapest and tokens[cheapest[0][1]] + num_tokens[number] > budget:
            passed.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        so_far, which = cheapest[0]
        packs[which].append(number)
        tokens[which] += num_tokens[number]
        heapq.heapreplace(cheapest, (so_far + of_sample[number], which))
        for one in passed:
            heapq.heappush(cheapest, one)
    return packs


def check_budget(dataset: FeatureDataset, budget: int, word: str) -> None:
    """Refuse samples that no sequence of a token budget takes.

    Args:
        dataset: the features. budget: tokens of a sequence. word: what the user calls it.

    Raises:
        DataError: DATA-077, for each shape of such samples.
    """
    problems = [
        Problem(
            "DATA-077",
            f"{count} sample{'s' if count > 1 else ''} with latents {list(shape)} have "
            f"{dataset.tokens_of(shape):,} tokens each, and {word} lets a sequence have {budget:,}.",
            f"Raise it to at least {max(dataset.token_counts())}, or leave such samples out of the features.",
        )
        for shape, count in dataset.buckets().items()
        if dataset.tokens_of(shape) > budget
    ]
    raise_limited(problems)


def most_places(counts: Collection[int], budget: int, samples: int, parts: int) -> int:
    """The most tokens that a sequence can have, padding of its samples included.

    Args:
        counts: the numbers of tokens that samples have. budget: tokens of a sequence, without padding.
        samples: of a step, in all replicas. parts: of equal length that each sample's tokens are cut into.
    """
    most = max(1, min(samples, budget // min(counts)))
    return min(budget, most * max(counts)) // parts * parts + most * (parts - 1)
