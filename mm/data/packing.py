"""Packs: the samples of a step dealt to sequences of a token budget, and these to replicas."""

from __future__ import annotations

from collections.abc import Sequence

from mm.data.balance import SequenceCost, deal
from mm.errors import DataError


def pack_step(
    num_tokens: Sequence[int],
    budget: int,
    cost: SequenceCost,
    *,
    num_replicas: int,
    num_stages: int = 1,
    multiple: int = 1,
) -> list[list[list[int]]]:
    """Pack the samples of one step into as few micro-batches a replica as can be, each at most `budget` tokens.

    The dearest sample goes first, each into the sequence that costs least so far among those with room for it; where
    one finds no room, every replica gets more sequences. So that all replicas run as many, samples must be at least as
    many as sequences.

    Args:
        num_tokens: of each sample, none above the budget. budget: tokens of a sequence. cost: of a sample.
        num_replicas: replicas. num_stages: of the pipeline. multiple: of which a replica's micro-batches are a number.

    Returns:
        For each replica its sequences, each with the numbers of its samples in their order.

    Raises:
        DataError: DATA-077 when there are fewer samples than sequences.
    """
    order = sorted(range(len(num_tokens)), key=lambda number: -cost(num_tokens[number]))
    least = -(-sum(num_tokens) // (budget * num_replicas))
    of_replica = -(-least // multiple) * multiple
    while of_replica * num_replicas <= len(num_tokens):
        packs = _packed(order, num_tokens, budget, cost, of_replica * num_replicas)
        if packs is not None:
            costs = [sum(cost(num_tokens[number]) for number in pack) for pack in packs]
            return [[sorted(packs[which]) for which in own] for own in deal(costs, num_replicas, num_stages)]
        of_replica += multiple
    raise DataError(
        "DATA-077",
        f"A step of {len(num_tokens)} samples of {sum(num_tokens)} tokens needs {of_replica * num_replicas} sequences of "
        f"{budget}, {of_replica} on each of {num_replicas} replicas.",
        "Raise the global batch size or data.pack_tokens, or use fewer replicas.",
    )


def _packed(
    order: Sequence[int], num_tokens: Sequence[int], budget: int, cost: SequenceCost, count: int
) -> list[list[int]] | None:
    """So many sequences, none of them empty; None where a sample finds no room."""
    packs: list[list[int]] = [[] for _ in range(count)]
    tokens, costs = [0] * count, [0.0] * count
    for number in order:
        room = [which for which in range(count) if tokens[which] + num_tokens[number] <= budget]
        if not room:
            return None
        best = min(room, key=lambda which: (costs[which], which))
        packs[best].append(number)
        tokens[best] += num_tokens[number]
        costs[best] += cost(num_tokens[number])
    return packs if all(packs) else None
