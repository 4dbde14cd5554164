"""Packs: which samples of a step share a sequence, and that they are read as they are read one by one."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stores import MODEL, feature_set, write_store

from mm.config.bad_samples import parse_on_bad_sample
from mm.data.balance import SequenceCost
from mm.data.dataset import FeatureDataset, open_features
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.packed import PackedBatch, is_packed
from mm.data.packing import check_budget, most_places, pack_step
from mm.data.sampler import BatchPlan
from mm.data.steps import StepBatches, step_batches
from mm.errors import DataError
from mm.parallel.tokens import TokenShare

COST = SequenceCost(20.0, 1.0)
SHAPES = ((16, 1, 4, 4), (16, 5, 8, 8), (16, 2, 4, 8), (16, 1, 8, 8), (16, 3, 6, 8), (16, 1, 2, 2))
"""Of 4, 80, 16, 16, 36 and 1 tokens."""
BUDGET = 96


def drawn_step(seed: int, samples: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([1, 4, 9, 16, 36, 60, 80]) for _ in range(samples)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("replicas", "stages", "multiple"), [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 2)])
def test_every_sample_is_packed_once_within_the_budget(seed: int, replicas: int, stages: int, multiple: int) -> None:
    tokens = drawn_step(seed, 24)
    packs = pack_step(tokens, BUDGET, COST, num_replicas=replicas, num_stages=stages, multiple=multiple)
    assert sorted(number for replica in packs for pack in replica for number in pack) == list(range(24))
    assert len(packs) == replicas and len({len(replica) for replica in packs}) == 1
    assert len(packs[0]) % multiple == 0
    assert all(pack and sum(tokens[number] for number in pack) <= BUDGET for replica in packs for pack in replica)
    assert packs == pack_step(tokens, BUDGET, COST, num_replicas=replicas, num_stages=stages, multiple=multiple)
    places = most_places(set(tokens), BUDGET, 24, 4)
    share = TokenShare(0, 4)
    assert all(4 * share.places([tokens[number] for number in pack]) <= places for own in packs for pack in own)


def test_samples_as_long_as_the_budget_stand_alone() -> None:
    packs = pack_step([BUDGET] * 8, BUDGET, COST, num_replicas=2, multiple=2)
    assert packs == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]


def test_a_large_budget_makes_one_sequence_of_each_replica() -> None:
    tokens = drawn_step(3, 16)
    packs = pack_step(tokens, 10**9, COST, num_replicas=4)
    assert [len(replica) for replica in packs] == [1] * 4
    costs = [sum(COST(tokens[number]) for number in replica[0]) for replica in packs]
    assert max(costs) <= sum(costs) / 4 + max(map(COST, tokens)) * 3 / 4, "Graham's bound"


def test_the_best_of_all_ways() -> None:
    """9 + 1, 8 + 2 and 7 + 3 fill three sequences of 10, which no other way does."""
    packs = pack_step([1, 2, 3, 9, 8, 7], 10, SequenceCost(1.0, 0.0), num_replicas=3)
    assert sorted(pack for replica in packs for pack in replica) == [[0, 3], [1, 4], [2, 5]]


def test_a_pipeline_gets_more_and_shorter_sequences() -> None:
    """Sixteen samples alike fit into two sequences; four stages then idle most of the time.

    One replica of n equal sequences and p stages takes (n + p - 1) / n of the work.
    """
    for stages, times in ((1, 1), (2, 17 / 16), (4, 19 / 16)):
        (packs,) = pack_step([10] * 16, 80, SequenceCost(1.0, 0.0), num_replicas=1, num_stages=stages)
        taken = (len(packs) + stages - 1) / len(packs)
        assert times <= taken <= 1.02 * times
    assert len(packs) > 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "s", 12, shapes=SHAPES)


def opened(store: Path) -> FeatureDataset:
    return open_features(feature_set(store), MODEL)


OPTIONS: dict[str, Any] = {"text_len": 512, "seed": 5, "caption_dropout": 0.3, "with_noise": True}


def packed_steps(store: Path, count: int, dp_size: int = 1, dp_rank: int = 0, **options: Any) -> list[StepBatches]:
    plan = BatchPlan(8, 1, dp_rank, dp_size, pack_tokens=BUDGET)
    return list(islice(step_batches(opened(store), plan, **{**OPTIONS, **options}), count))


def one_by_one(store: Path, count: int, **options: Any) -> list[FeatureBatch]:
    return list(islice(feature_batches(opened(store), BatchPlan(8, 1), **{**OPTIONS, **options}), 8 * count))


def samples_of(step: StepBatches) -> list[FeatureBatch]:
    found = []
    for batch in step.batches:
        assert is_packed(batch)
        packed: PackedBatch = batch  # type: ignore[assignment]
        assert packed["sample"] == [name for one in packed["segments"] for name in one["sample"]]
        found += packed["segments"]
    return found


def by_name(samples: list[FeatureBatch]) -> list[FeatureBatch]:
    return sorted(samples, key=lambda one: (one["sample"], one["draw"]))


@pytest.mark.parametrize(("dp_size", "num_workers"), [(1, 0), (1, 2), (2, 0), (4, 0)])
def test_packed_samples_are_those_read_one_by_one(store: Path, dp_size: int, num_workers: int) -> None:
    """Latents, captions and their dropping, noise and draws, bit for bit, of all replicas' samples of each step."""
    replicas = [packed_steps(store, 6, dp_size, rank, num_workers=num_workers) for rank in range(dp_size)]
    alone = one_by_one(store, 6)
    for number, of_replicas in enumerate(zip(*replicas, strict=True)):
        found = by_name([sample for step in of_replicas for sample in samples_of(step)])
        for ours, theirs in zip(found, by_name(alone[8 * number : 8 * number + 8]), strict=True):
            assert (ours["sample"], ours["draw"]) == (theirs["sample"], theirs["draw"])
            assert all(torch.equal(ours[key], theirs[key]) for key in ("latents", "text", "noise"))  # type: ignore[literal-required]
        tokens = sorted(one["latents"].shape[2:].numel() // 4 for one in found)
        for step in of_replicas:
            assert len(step.batches) == len(of_replicas[0].batches)
            assert sorted(step.dealt.tokens) == tokens
            assert step.dealt.most == max(len(batch["sample"]) for other in of_replicas for batch in other.batches)
    assert any(len(batch["sample"]) > 1 for step in replicas[0] for batch in step.batches)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_resuming_goes_on_where_it_stopped(store: Path, step: int) -> None:
    whole, rest = packed_steps(store, 6), packed_steps(store, 6 - step, consumed_samples=8 * step)
    assert [[b["sample"] for b in s.batches] for s in rest] == [[b["sample"] for b in s.batches] for s in whole[step:]]


def test_a_damaged_sample_gives_way_to_one_of_its_shape(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", 12, shapes=SHAPES)
    file = next((store / "features").glob("1_mp4-*"))  # with its like, 7.mp4, the longest
    file.write_bytes(file.read_bytes()[:-1])
    policy = parse_on_bad_sample("skip:max=50%")
    found = packed_steps(store, 6, on_bad_sample=policy)
    shapes = [[tuple(one["latents"].shape) for one in samples_of(step)] for step in found]
    whole = write_store(tmp_path / "whole", 12, shapes=SHAPES)
    assert shapes == [[tuple(one["latents"].shape) for one in samples_of(step)] for step in packed_steps(whole, 6)]
    replaced = [name for step in found for batch in step.batches for name in batch.get("replaced", [])]
    assert set(replaced) == {"videos/1.mp4"} and len(replaced) == 4  # 48 samples are four epochs
    names = Counter(name for step in found for batch in step.batches for name in batch["sample"])
    assert names["videos/7.mp4"] == 8 and "videos/1.mp4" not in names


def test_samples_longer_than_the_budget_are_counted_by_shape(store: Path) -> None:
    check_budget(opened(store), 80, "--pack 80")
    with pytest.raises(DataError) as caught:
        check_budget(opened(store), 32, "--pack 32")
    first, second = map(str, caught.value.problems)
    assert first == (
        "DATA-077: 2 samples with latents [16, 3, 6, 8] have 36 tokens each, and --pack 32 lets a sequence have 32. "
        "Fix: Raise it to at least 80, or leave such samples out of the features."
    )
    assert "2 samples with latents [16, 5, 8, 8] have 80 tokens" in second
