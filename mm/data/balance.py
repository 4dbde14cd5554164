"""Costs of samples, and micro-batches dealt to replicas so that none waits long for the dearest."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mm.config.model import WanConfig


@dataclass(frozen=True, slots=True)
class SequenceCost:
    """Cost of a sequence of s tokens, alpha s + beta s^2, in any unit.

    Attributes:
        alpha: of a token. beta: of a pair of tokens.
    """

    alpha: float
    beta: float

    def __call__(self, num_tokens: int) -> float:
        """The cost of one sample."""
        return self.alpha * num_tokens + self.beta * num_tokens**2


def cost_of_model(model: WanConfig) -> SequenceCost:
    """Multiplications and additions of the forward of a model's blocks, the greater part of a step.

    A block has four D x D linears of self attention and two of cross attention for each token of the video, the
    feed-forward's two, the products of cross attention with text and image tokens, and those of self attention with
    each other. Side blocks have as much, and a D x D linear of their hint; the first one has another. Backward takes
    twice as much of each, which changes no ratio.
    """
    width, sides = model.hidden_size, len(model.side_blocks)
    layers, projections = model.num_layers + sides, sides + 1 if sides else 0
    context = model.text_len + model.image_tokens
    block = 6 * width**2 + 2 * width * model.ffn_dim + 2 * context * width
    alpha = 2 * (layers * block + projections * width**2)
    return SequenceCost(float(alpha), float(layers * 4 * width))


def sequence_cost(model: WanConfig, pair_cost: float | None) -> SequenceCost:
    """The cost by which micro-batches are dealt.

    Args:
        model: whose shape tells it. pair_cost: cost of a pair of tokens by that of a token, as measured; None takes the
            model's.
    """
    return cost_of_model(model) if pair_cost is None else SequenceCost(1.0, pair_cost)


def replica_time(costs: Sequence[float], num_stages: int = 1) -> float:
    """Time of one replica's step, in the unit of its micro-batches' costs.

    In a pipeline a micro-batch is in one of `num_stages` equally long stages at a time, and the others wait before and
    after the dearest one, which so counts once for each stage: sum + (stages - 1) max, exact where all cost the same.
    """
    return sum(costs) + (num_stages - 1) * max(costs)


def least_time(of_samples: Sequence[float], num_replicas: int, num_stages: int = 1) -> float:
    """Bound below which no dealing and no packing of a step's samples lets its slowest replica come.

    One replica has no less than the mean; and the dearest sample passes every stage, forward and backward, one after
    the other.
    """
    return max(sum(of_samples) / num_replicas, num_stages * max(of_samples))


def deal(costs: Sequence[float], num_replicas: int, num_stages: int = 1) -> list[list[int]]:
    """Deal micro-batches to replicas, equally many to each, so that all take about as long.

    The dearest go first, each to the replica with the least so far among those with room (Graham 1969, "Bounds on
    Multiprocessing Timing Anomalies"). Where all cost the same, replica r gets those at r, r + replicas and so on.
    In a pipeline a replica's first, which is its dearest, counts once for each stage (`replica_time`). Its cheapest
    come first and last there, where the pipeline fills and empties.

    Args:
        costs: of the micro-batches of a step. num_replicas: divides their number. num_stages: of the pipeline.

    Returns:
        For each replica the numbers of its micro-batches, in the order that it takes them in.
    """
    room = len(costs) // num_replicas
    dealt: list[list[int]] = [[] for _ in range(num_replicas)]
    replicas = [(0.0, 0, replica) for replica in range(num_replicas)]  # cost and micro-batches so far
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        cost, count, replica = heapq.heappop(replicas)
        dealt[replica].append(number)
        if count + 1 < room:
            cost += costs[number] * (num_stages if count == 0 else 1)
            heapq.heappush(replicas, (cost, count + 1, replica))
    if num_stages == 1 or len(set(costs)) == 1:
        return [sorted(numbers) for numbers in dealt]
    return [numbers[::-1][::2] + numbers[::-1][1::2][::-1] for numbers in dealt]
