"""Which blocks stay: the most that fit, spread so that every copy has something to hide behind."""

import itertools

import pytest

from mm.residency.plan import (
    BlockSize,
    WeightPlan,
    by_parameters,
    evenly,
    fewest_copied,
    least_device_bytes,
    within_host,
)

EQUAL = [BlockSize(100, 40)] * 10
MIXED = [BlockSize(100 + 30 * (n % 3 == 0), 40) for n in range(10)]


def gaps(copied: tuple[int, ...], num_blocks: int) -> list[int]:
    """Blocks from one that is copied to the next, around the circle."""
    return [
        (after - before - 1) % num_blocks + 1 for before, after in zip(copied, (*copied[1:], copied[0]), strict=True)
    ]


@pytest.mark.parametrize("num_blocks", [3, 7, 30, 40, 48])
def test_copied_blocks_are_spread_as_evenly_as_they_can_be(num_blocks: int) -> None:
    for count in range(1, num_blocks + 1):
        copied = evenly(num_blocks, count)
        assert len(copied) == count and sum(gaps(copied, num_blocks)) == num_blocks
        assert min(gaps(copied, num_blocks)) == num_blocks // count  # no choice has more
        assert max(gaps(copied, num_blocks)) == -(-num_blocks // count)


def test_the_fewest_are_copied_that_fit() -> None:
    for blocks, limit in itertools.product((EQUAL, MIXED), range(0, 1400, 10)):
        choices = [WeightPlan(evenly(10, count)) for count in (0, *range(3, 11))]
        fit = [choice for choice in choices if choice.device_bytes(blocks) <= limit]
        plan = fewest_copied(blocks, limit)
        assert plan == min(fit, key=lambda choice: len(choice.copied), default=None)
        assert (plan is None) == (limit < least_device_bytes(blocks))


def test_device_memory_of_a_plan() -> None:
    assert WeightPlan().device_bytes(EQUAL) == 1000
    assert WeightPlan(evenly(10, 3)).device_bytes(EQUAL) == 700 + 2 * 100
    assert WeightPlan(evenly(10, 10)).device_bytes(MIXED) == least_device_bytes(MIXED) == 2 * 130
    assert WeightPlan(evenly(10, 10)).copied_bytes(MIXED) == WeightPlan(evenly(10, 10)).host_bytes(MIXED) == 1120


def test_copying_two_blocks_would_save_nothing() -> None:
    assert fewest_copied(EQUAL, 999) == WeightPlan(evenly(10, 3))


@pytest.mark.parametrize(("number", "staying"), [(400, 10), (399, 7), (280, 7), (279, 6), (40, 1), (39, 0), (0, 0)])
def test_parameters_that_stay(number: int, staying: int) -> None:
    assert 10 - len(by_parameters(EQUAL, number).copied) == staying


def test_files_are_the_last_resort() -> None:
    plan = WeightPlan(evenly(10, 10))
    assert within_host(plan, EQUAL, 1000) == plan
    for limit in range(200, 1000, 10):
        found = within_host(plan, EQUAL, limit)
        assert found is not None and found.host_bytes(EQUAL) <= limit
        fewer = len(found.from_files) - 1
        assert fewer == 0 or (10 - fewer) * 100 + 2 * 100 > limit
        assert found.host_bytes(EQUAL) == (10 - fewer - 1) * 100 + 2 * 100
    assert within_host(plan, EQUAL, 199) is None  # files are read into two pieces
