"""The sampling plan: every sample as often as it should come, in any order of asking, the same for every layout."""

import hashlib
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from fractions import Fraction
from itertools import chain, islice, pairwise

import pytest

from mm.data.balance import SequenceCost, cost_of_model, deal, least_time, replica_time
from mm.data.bijection import KeyedBijection
from mm.data.plan import Bucket, PlannedSample, PlannedSource, SamplingPlan
from mm.data.sampler import BatchPlan, DealtStep, MicroBatchSampler


def drawn_key(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_a_bijection_has_every_value_once_and_an_inverse(size: int) -> None:
    for key in (0, 1, 2**63 - 1, drawn_key("a")):
        order = KeyedBijection(size, key)
        values = [order(place) for place in range(size)]
        assert sorted(values) == list(range(size))
        assert [order.place_of(value) for value in values] == list(range(size))


@pytest.mark.parametrize(("size", "bound"), [(3, 20.5), (4, 49.7), pytest.param(5, 172.5, marks=pytest.mark.nightly)])
def test_all_orders_of_a_few_values_come_equally_often(size: int, bound: float) -> None:
    """Pearson's chi-square against its 99.9 % quantile for n! - 1 degrees of freedom, of fixed keys."""
    orders, each = math.factorial(size), 200
    found = Counter(
        tuple(map(KeyedBijection(size, drawn_key(f"{size}/{number}")), range(size))) for number in range(orders * each)
    )
    assert sum((count - each) ** 2 / each for count in found.values()) + (orders - len(found)) * each < bound


def test_places_of_ten_million_values_are_spread_and_do_not_follow_each_other() -> None:
    size = 10_000_000
    order = KeyedBijection(size, drawn_key("large"))
    values = [order(place) for place in range(10_000)]
    tenths = Counter(value * 10 // size for value in values)
    assert sum((count - 1000) ** 2 / 1000 for count in tenths.values()) < 27.9  # 99.9 % for 9 degrees
    ascents = sum(a < b for a, b in pairwise(values))
    assert abs(ascents - 4999.5) < 3.3 * math.sqrt(10_001 / 12)  # variance of ascents of a random permutation


@pytest.mark.parametrize("index", [-1, 5])
def test_a_place_beyond_the_end_is_an_error(index: int) -> None:
    with pytest.raises(IndexError):
        KeyedBijection(5, 1)(index)


def tokens_of(index: int) -> int:
    return 3 * index + 7


def source(*sizes: int, first: int = 0, group: int = 1, **settings: object) -> PlannedSource:
    """Buckets of these sizes, one after the other from an index on."""
    begins = [first + sum(sizes[:number]) for number in range(len(sizes))]
    buckets = [
        Bucket(
            f"{begin}",
            size,
            range(begin, begin + size).__getitem__,
            lambda k, begin=begin: tokens_of(begin + k),  # type: ignore[misc]
        )
        for begin, size in zip(begins, sizes, strict=True)
    ]
    return PlannedSource(buckets, group, **settings)  # type: ignore[arg-type]


def samples(plan: SamplingPlan, slots: range) -> list[PlannedSample]:
    return [sample for slot in slots for sample in plan.group(slot)]


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    plan = SamplingPlan([source(50)], seed=3)
    epochs = [samples(plan, range(50 * epoch, 50 * epoch + 50)) for epoch in range(3)]
    orders = [[sample.index for sample in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [{sample.draw for sample in epoch} for epoch in epochs] == [{0}, {1}, {2}]
    assert orders[0] != [sample.index for sample in samples(SamplingPlan([source(50)], seed=4), range(50))]
    listed = SamplingPlan([source(5, group=2)], seed=3, shuffle=False)
    assert [sample.index for sample in samples(listed, range(5))] == [0, 1, 2, 3, 4] * 2


def test_a_bucket_alone_is_walked_alike_by_groups_of_any_size() -> None:
    one, four = (SamplingPlan([source(7, group=size)], seed=1) for size in (1, 4))
    assert samples(one, range(84)) == samples(four, range(21))


def test_groups_are_of_one_bucket_and_leave_no_sample_out() -> None:
    plan = SamplingPlan([source(10, 7, 3, group=4)], seed=1)
    groups = [plan.group(slot) for slot in range(400)]
    assert all(len({sample.walk for sample in group}) == 1 for group in groups)
    for bucket, size in enumerate((10, 7, 3)):
        walked = sorted(s.position for group in groups for s in group if s.walk == (0, bucket))
        assert walked == list(range(80 * size))  # 400 groups of 4 are 80 epochs of 20 samples
    assert [group[0].walk for group in groups[:5]] != [group[0].walk for group in groups[5:10]]


def test_any_slot_is_computed_by_itself() -> None:
    def plan() -> SamplingPlan:
        return SamplingPlan([source(100, 37, group=3), source(11, first=200, group=3, repeats=3)], seed=9)

    walked = plan()
    groups = [walked.group(slot) for slot in range(10_000)]
    for slot in (0, 9_999, 4_096, 4_095, 77):
        assert plan().group(slot) == groups[slot]


def test_sources_are_mixed_by_weight_between_their_steps() -> None:
    plan = SamplingPlan(
        [
            source(1000, group=2),
            source(500, first=1000, group=2, weight=Fraction(3), begin=100, end=9000),
            source(200, 40, first=2000, group=2, repeats=2),
        ],
        seed=1,
    )
    groups = [plan.group(slot) for slot in range(9000 + 2 * 4096)]
    parts = [Counter(group[0].walk[0] for group in part) for part in (groups[:100], groups[100:9000], groups[9000:])]
    assert parts[0] == {0: 67, 2: 33}  # 1000 : 480
    assert parts[1] == {0: 2986, 1: 4480, 2: 1434}  # 1000 : 1500 : 480
    assert parts[2] == {0: 5535, 2: 2657}
    for walk in ((0, 0), (1, 0)):  # nothing is left out or comes twice where phases and blocks meet
        positions = sorted(sample.position for group in groups for sample in group if sample.walk == walk)
        assert positions == list(range(len(positions)))


def test_an_epoch_of_a_mixture_has_each_sample_once_for_each_repeat() -> None:
    """Epochs of 10, 10, 10 + 2 x 3, and then of 2 x 3 slots, which are whole steps of four or begin within one."""
    sources = [source(10, end_epoch=3), source(3, first=10, repeats=2, begin_epoch=2)]
    plan = SamplingPlan(sources, seed=1, slots_of_step=4)
    assert [plan.open_slots(number) for number in range(2)] == [(0, 36), (20, None)]
    drawn = [Counter(sample.index for sample in samples(plan, range(*part))) for part in ((0, 20), (20, 36), (36, 42))]
    assert drawn[0] == dict.fromkeys(range(10), 2)
    assert drawn[1] == {index: 1 if index < 10 else 2 for index in range(13)}
    assert drawn[2] == dict.fromkeys(range(10, 13), 2)
    late = SamplingPlan(
        sources, seed=1, slots_of_step=3
    )  # 20 is within a step: it begins with the next, and ends in time
    assert [late.open_slots(number) for number in range(2)] == [(0, 36), (21, None)]
    assert late.group(35) == SamplingPlan(sources, seed=1, slots_of_step=3).group(35), "any slot by itself"


def test_epochs_and_steps_open_and_close_sources_as_a_walk_step_by_step_does() -> None:
    """Of drawn mixtures: who is open is decided step by step, by what was drawn before, as in a loop over epochs."""
    draw = random.Random(3)
    bound: Callable[[int], int | None] = lambda most: draw.choice([None, draw.randrange(1, most)])  # noqa: E731
    for number in range(25):
        sources = [
            source(
                draw.randrange(1, 60),
                draw.randrange(1, 9),
                first=100 * one,
                group=draw.choice([1, 2, 3]),
                repeats=draw.choice([1, 1, 3]),
                weight=draw.choice([Fraction(1), Fraction(2), Fraction(1, 3)]),
                begin=4 * (bound(9) or 0) if one else 0,
                end=4 * (bound(60) or 60) if one else None,
                begin_epoch=bound(4) or 0 if one else 0,
                end_epoch=bound(7) if one else None,
            )
            for one in range(4)
        ]
        plan = SamplingPlan(sources, seed=number, slots_of_step=4)
        epochs, opened = Fraction(0), [list[int]() for _ in sources]
        for slot in range(0, 4 * 80, 4):
            now = [
                one
                for one, each in enumerate(sources)
                if slot >= each.begin and epochs >= each.begin_epoch
                and (each.end is None or slot < each.end) and (each.end_epoch is None or epochs < each.end_epoch)
            ]  # fmt: skip
            assert {plan.group(slot + place)[0].walk[0] for place in range(4)} <= set(now)
            for one in now:
                opened[one].append(slot)
            epochs += Fraction(4) / sum(each.groups_of_epoch for each in (sources[one] for one in now))
        for one, slots in enumerate(opened):
            found = plan.open_slots(one)
            first, last = (None, 320) if found is None else (found[0], 320 if found[1] is None else found[1])
            assert slots == ([] if first is None else list(range(first, min(320, last), 4)))


def test_mixed_sources_are_walked_in_their_own_order() -> None:
    """So that a small store has each of its samples once before any comes again, as it has alone."""
    plan = SamplingPlan([source(50), source(7, first=50, weight=Fraction(5), begin=90)], seed=1)
    drawn = samples(plan, range(90 + 4096 + 100))
    for walk in ((0, 0), (1, 0)):
        positions = [sample.position for sample in drawn if sample.walk == walk]
        assert positions == list(range(len(positions))) and len(positions) > 1000


def test_a_plan_ends_where_no_source_is_open() -> None:
    plan = SamplingPlan([source(5, end=10), source(5, begin=11)], seed=1)
    assert plan.end == 10 and plan.group(9)
    for slot in (-1, 10, 12):
        with pytest.raises(IndexError, match="no slot"):
            plan.group(slot)
        with pytest.raises(IndexError, match="no slot"):
            plan.tokens(slot)
    assert SamplingPlan([source(5, begin=1)], seed=1).end == 0
    assert SamplingPlan([source(5, end=10), source(5, begin=10)], seed=1).end is None
    dealt = [list(MicroBatchSampler(plan, BatchPlan(2, 1, rank, 2), 4)) for rank in range(2)]
    assert [group for pair in zip(*dealt, strict=True) for group in pair] == [plan.group(slot) for slot in range(4, 10)]


def test_tokens_of_a_slot_are_told_without_looking_its_samples_up() -> None:
    looked_up: list[int] = []

    def member(k: int) -> int:
        looked_up.append(k)
        return k

    plan = SamplingPlan([source(9, 8, group=2), source(11, first=17, group=3)], seed=5)
    assert all(plan.tokens(slot) == [tokens_of(sample.index) for sample in plan.group(slot)] for slot in range(40))
    buckets = [Bucket("all", 9, member, tokens_of)]
    sampler = MicroBatchSampler(SamplingPlan([PlannedSource(buckets)], 1), BatchPlan(6, 1, 0, 3), 0, float)
    assert len(list(islice(sampler, 2))) == 2 and len(looked_up) == 2  # not those of the other replicas


def test_sources_have_groups_of_their_own_size() -> None:
    """Samples come by size and weight, whatever the groups: here 600 : 2 x 150 of 900."""
    plan = SamplingPlan([source(600, group=1), source(100, 50, first=600, group=3, weight=Fraction(2))], seed=4)
    groups = [plan.group(slot) for slot in range(7 * 4096)]
    assert {(group[0].walk[0], len(group)) for group in groups} == {(0, 1), (1, 3)} and not plan.is_even
    of_source = Counter(sample.walk[0] for group in groups for sample in group)
    assert of_source[0] == 6 * 4096 and of_source[1] == 3 * 4096  # six groups of one to one of three
    for walk in ((0, 0), (1, 0), (1, 1)):
        positions = sorted(sample.position for group in groups for sample in group if sample.walk == walk)
        assert len(set(positions)) == len(positions)
        assert walk[0] or positions == list(range(len(positions)))


def test_a_step_of_uneven_groups_is_dealt_and_told() -> None:
    plan = SamplingPlan([source(20, group=1), source(40, first=20, group=4)], seed=7)
    expected = [plan.group(slot) for slot in range(12, 24)]
    dealt = [deque[DealtStep]() for _ in range(3)]
    found = [
        list(islice(MicroBatchSampler(plan, BatchPlan(12, 1, rank, 3), 12, float, dealt[rank]), 4)) for rank in range(3)
    ]
    assert sorted(map(repr, chain(*found))) == sorted(map(repr, expected))
    for groups, (step,) in zip(found, dealt, strict=True):
        assert step.sizes == tuple(map(len, groups)) and step.most == 4
        assert sorted(step.tokens) == sorted(tokens_of(sample.index) for group in expected for sample in group)


def test_the_next_in_an_epoch_goes_once_around_its_bucket() -> None:
    plan = SamplingPlan([source(6, 5, group=2)], seed=2)
    sample = plan.group(17)[1]
    around = [sample]
    for _ in range((6, 5)[sample.walk[1]] - 1):
        around.append(plan.next_in_epoch(around[-1]))
    assert plan.next_in_epoch(around[-1]) == sample
    assert len({other.index for other in around}) == len(around)
    assert {(other.walk, other.draw) for other in around} == {(sample.walk, sample.draw)}


@pytest.mark.parametrize("cost", [None, lambda index: 1.0, lambda index: float(index**2)])
@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(1, 2), (2, 2), (3, 2), (6, 2)])
def test_a_step_sees_the_same_samples_in_every_layout(dp_size: int, micro_batch_size: int, cost: object) -> None:
    plan = SamplingPlan([source(9, 8, group=micro_batch_size)], seed=5)
    per_step = 12 // (dp_size * micro_batch_size)
    found = [
        list(
            islice(
                MicroBatchSampler(plan, BatchPlan(12, micro_batch_size, rank, dp_size), 24, cost),  # type: ignore[arg-type]
                4 * per_step,
            )
        )
        for rank in range(dp_size)
    ]
    for step in range(4):
        seen = [group for replica in found for group in replica[step * per_step : (step + 1) * per_step]]
        expected = [plan.group(slot) for slot in range(12 + 6 * step, 18 + 6 * step)]
        assert sorted(map(repr, seen)) == sorted(map(repr, expected))


def test_equal_costs_are_dealt_in_turn() -> None:
    assert deal([7.0] * 12, 4) == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]


def test_dear_micro_batches_go_to_different_replicas() -> None:
    """The best of all ways: 9 + 1, 8 + 2 and 7 + 3, of equally many."""
    dealt = deal([1.0, 2.0, 3.0, 9.0, 8.0, 7.0], 3)
    assert sorted(dealt) == [[0, 3], [1, 4], [2, 5]]


def test_in_a_pipeline_the_dearest_counts_for_every_stage_and_the_cheapest_are_at_the_ends() -> None:
    costs = [10.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert deal(costs, 2) == [[0, 3, 5], [1, 2, 4]]  # 16 and 14
    assert deal([1.0, 5.0, 2.0, 4.0, 3.0], 1, num_stages=2) == [[0, 4, 1, 3, 2]]  # 1 3 5 4 2
    assert deal([2.0] * 6, 2, num_stages=4) == [[0, 2, 4], [1, 3, 5]]
    assert deal(costs, 2, num_stages=3) == [[5, 0, 4], [3, 1, 2]]  # 30 + 5 and 18 + 9


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_no_dealing_goes_below_the_least_time(stages: int) -> None:
    """Of all dealings of six to two replicas; of micro-batches that cost the same the count of passes is known."""
    draw = random.Random(stages)
    for _ in range(20):
        costs = [float(draw.randint(1, 90)) for _ in range(6)]
        times = [
            max(replica_time([costs[i] for i in part], stages) for part in (one, set(range(6)) - set(one)))
            for one in itertools.combinations(range(6), 3)
        ]
        dealt = max(replica_time([costs[i] for i in part], stages) for part in deal(costs, 2, stages))
        assert least_time(costs, 2, stages) <= min(times) <= dealt
    assert replica_time([2.0] * 5, stages) == (5 + stages - 1) * 2.0


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_mixture_of_images_and_clips_is_dealt_evenly(stages: int) -> None:
    """64 replicas of 16 samples as of a public video set; the dearest replica is within 3 % of the mean, the dearest
    micro-batch of each counted for every stage, or at what the dearest clip alone takes.
    """
    draw, cost = random.Random(7), SequenceCost(14_000.0, 1.0)
    sizes = [26 * 15, 40 * 23, 52 * 30, 80 * 45]
    for _ in range(3):
        frames = [1 if draw.random() < 0.2 else draw.randrange(5, 34) for _ in range(64 * 16)]
        costs = [cost(draw.choice(sizes) * number) for number in frames]
        times = [replica_time([costs[i] for i in own], stages) for own in deal(costs, 64, stages)]
        assert max(times) <= max(1.03 * sum(times) / 64, 1.01 * least_time(costs, 64, stages))


def test_costs_are_the_operations_of_the_blocks() -> None:
    """Of Wan2.1 1.3B at 32,760 tokens, counted by hand for one block: linears, cross attention, self attention."""
    from mm.config.model import WAN_1_3B, of_task
    from mm.config.tasks.vace import VACE

    cost = cost_of_model(WAN_1_3B)
    tokens = 32_760
    linears = 2 * tokens * (6 * 1536 * 1536 + 2 * 1536 * 8960)
    cross, itself = 4 * tokens * 512 * 1536, 4 * tokens * tokens * 1536
    assert cost(tokens) == 30 * (linears + cross + itself)
    sides = of_task(WAN_1_3B, VACE)
    projections = (15 + 1) * 2 * tokens * 1536 * 1536
    assert cost_of_model(sides)(tokens) == 45 * (linears + cross + itself) + projections
    assert SequenceCost(2.0, 3.0)(10) == 320
