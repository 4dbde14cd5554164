"""Box arithmetic against numpy index arrays and against exhaustive search."""

import random
from functools import cache
from itertools import product
from math import prod

import numpy as np
import pytest

from mm.checkpoint.boxes import Box, covers_exactly_once, flat_range_to_boxes, intersect, whole


def random_shape(rng):
    return tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))


def random_box(rng, shape):
    starts = [rng.randrange(size) for size in shape]
    return Box(tuple(starts), tuple(rng.randint(1, size - s) for s, size in zip(starts, shape, strict=True)))


def elements(shape, box):
    return np.arange(prod(shape)).reshape(shape)[box.slices].reshape(-1)


def test_flat_ranges_equal_numpy_in_order_and_number():
    rng = random.Random(1)
    for _ in range(500):
        shape = random_shape(rng)
        start, stop = sorted(rng.randint(0, prod(shape)) for _ in range(2))
        boxes = flat_range_to_boxes(shape, start, stop)
        found = np.concatenate([elements(shape, box) for box in boxes]) if boxes else np.arange(0)
        assert found.tolist() == list(range(start, stop)), (shape, start, stop, boxes)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def fewest(shape, start, stop):
    """The fewest contiguous boxes by dynamic programming over all cut points."""
    boxes = {
        tuple(elements(shape, Box(o, s)))
        for o in product(*(range(n) for n in shape))
        for s in product(*(range(1, n - first + 1) for first, n in zip(o, shape, strict=True)))
    }

    @cache
    def best(position):
        if position == stop:
            return 0
        ends = [e for e in range(position + 1, stop + 1) if tuple(range(position, e)) in boxes]
        return 1 + min(best(end) for end in ends)

    return best(start)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2), (2, 2, 3), (1, 4), (3, 3)])
def test_flat_ranges_give_the_fewest_contiguous_boxes(shape):
    for start in range(prod(shape)):
        for stop in range(start + 1, prod(shape) + 1):
            assert len(flat_range_to_boxes(shape, start, stop)) == fewest(shape, start, stop)


def test_a_ragged_range_of_a_matrix_is_three_boxes():
    assert flat_range_to_boxes((4, 5), 3, 17) == [Box((0, 3), (1, 2)), Box((1, 0), (2, 5)), Box((3, 0), (1, 2))]


@pytest.mark.parametrize(("shape", "start", "stop"), [((2, 3), -1, 2), ((2, 3), 4, 3), ((2, 3), 0, 7), ((0, 3), 0, 1)])
def test_ranges_outside_the_tensor_are_refused(shape, start, stop):
    with pytest.raises(ValueError, match="does not lie inside"):
        flat_range_to_boxes(shape, start, stop)


def test_empty_tensors_and_ranges_have_no_boxes():
    assert flat_range_to_boxes((0, 3), 0, 0) == []
    assert flat_range_to_boxes((2, 3), 4, 4) == []
    assert flat_range_to_boxes((), 0, 1) == [Box((), ())]


def test_intersections_equal_set_intersections():
    rng = random.Random(2)
    for _ in range(500):
        shape = random_shape(rng)
        first, second = random_box(rng, shape), random_box(rng, shape)
        common = intersect(first, second)
        expected = set(elements(shape, first)) & set(elements(shape, second))
        assert (set(elements(shape, common)) if common else set()) == expected
        if common:
            assert common.within(first).offsets == tuple(
                c - f for c, f in zip(common.offsets, first.offsets, strict=True)
            )


def partition(rng, box):
    """A random cut of a box into boxes, by halving along random dims."""
    splittable = [d for d, size in enumerate(box.sizes) if size > 1]
    if not splittable or rng.random() < 0.3:
        return [box]
    dim = rng.choice(splittable)
    cut = rng.randint(1, box.sizes[dim] - 1)
    sizes, rest, offsets = list(box.sizes), list(box.sizes), list(box.offsets)
    sizes[dim], rest[dim], offsets[dim] = cut, box.sizes[dim] - cut, box.offsets[dim] + cut
    parts = (Box(box.offsets, tuple(sizes)), Box(tuple(offsets), tuple(rest)))
    return [piece for part in parts for piece in partition(rng, part)]


def test_coverage_agrees_with_counting_on_partitions_and_on_damaged_ones():
    rng = random.Random(3)
    wrong = 0
    for _ in range(500):
        shape = random_shape(rng)
        boxes = partition(rng, whole(shape))
        damage = rng.choice(["none", "drop", "repeat", "add", "swap"])
        if damage == "drop":
            boxes.pop(rng.randrange(len(boxes)))
        elif damage == "repeat":
            boxes.append(rng.choice(boxes))
        elif damage == "add":
            boxes.append(random_box(rng, shape))
        elif damage == "swap":
            boxes[rng.randrange(len(boxes))] = random_box(rng, shape)
        rng.shuffle(boxes)
        counts = np.zeros(shape, dtype=int)
        for box in boxes:
            counts[box.slices] += 1
        exact = bool((counts == 1).all())
        wrong += not exact
        assert (covers_exactly_once(shape, boxes) is None) == exact, (shape, boxes)
    assert 100 < wrong < 450  # both outcomes were met


def test_coverage_says_what_is_wrong():
    left, right = Box((0, 0), (2, 2)), Box((0, 2), (2, 2))
    assert covers_exactly_once((2, 4), [left, right]) is None
    assert "4 of 8 elements are in no box" in covers_exactly_once((2, 4), [left])
    assert "overlap" in covers_exactly_once((2, 3), [left, Box((0, 1), (2, 2))])
    assert "outside" in covers_exactly_once((2, 3), [left, right])
    assert "no part" in covers_exactly_once((4,), [left])
    assert covers_exactly_once((0, 3), []) is None
    assert "overlap" in covers_exactly_once((), [Box((), ()), Box((), ())])


@pytest.mark.parametrize("dim", [0, 1])
def test_coverage_of_a_thousand_shards_along_either_dim_is_not_quadratic(dim, monkeypatch):
    from mm.checkpoint import boxes as module

    calls = []
    monkeypatch.setattr(module, "intersect", lambda a, b: calls.append(1) or intersect(a, b))
    shards = []
    for index in range(1000):
        offsets, sizes = [0, 0], [4000, 4000]
        offsets[dim], sizes[dim] = 4 * index, 4
        shards.append(Box(tuple(offsets), tuple(sizes)))
    assert covers_exactly_once((4000, 4000), shards) is None
    assert len(calls) < 2000
