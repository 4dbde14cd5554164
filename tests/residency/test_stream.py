"""Weights that are copied ahead of the computation: same bits, when copies begin, what is held where."""

from collections import Counter
from typing import Any

import pytest
import torch
from held_models import TINY, WITH_SIDES, held, inputs, plain, write
from late_queues import LateQueues
from torch import Tensor

from mm.config.model import WanConfig
from mm.device.backend import select
from mm.device.queues import HostQueues, Queue, TransferEvent
from mm.errors import ConfigError, DataError
from mm.residency.hold import WeightValues, hold_weights
from mm.residency.plan import WeightPlan, evenly
from mm.wan.model import WanModel

MODELS = {"t2v": (TINY, 6), "side blocks": (WITH_SIDES, 9)}
FILES = WeightPlan((0, 1, 2, 3, 4, 5), frozenset((1, 4, 5)))


def velocities(model: Any, wan: WanConfig, count: int = 2) -> list[Tensor]:
    with torch.no_grad():
        return [model.velocity(**inputs(wan, seed)) for seed in range(count)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_copied", [0, 3, 4, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_the_latest_copies_change_no_bit(name: str, num_copied: Any) -> None:
    wan, blocks = MODELS[name]
    plan = WeightPlan(evenly(blocks, blocks if num_copied == "all" else num_copied))
    model, _ = held(wan, plan, queues=LateQueues())
    assert same(velocities(model, wan, 3), velocities(plain(wan), wan, 3))


def test_weights_that_are_read_from_files_change_no_bit() -> None:
    model, weights = held(TINY, FILES, queues=LateQueues())
    assert same(velocities(model, TINY, 3), velocities(plain(TINY), TINY, 3))
    assert weights.stream is not None and weights.stream.out_of_turn == 0


def test_the_computation_waits_for_copies() -> None:
    model, _ = held(TINY, WeightPlan(evenly(6, 6)), queues=LateQueues(deaf=("compute", "to device")))
    assert not same(velocities(model, TINY), velocities(plain(TINY), TINY))


class Watched(HostQueues):
    """Knows behind which computation each copy begins."""

    def __init__(self) -> None:
        self.computed = 0
        self.waited = 0
        self.copies: list[tuple[int, int]] = []  # (first address written, behind the computation so far)

    def record(self, queue: Queue) -> Any:
        self.computed += queue == "compute"
        return queue, self.computed

    def wait(self, queue: Queue, event: Any) -> None:
        if queue == "to device":
            assert event[0] == "compute"
            self.waited = event[1]

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        self.copies.append((target.data_ptr(), self.waited))
        super().copy(queue, target, source)


def test_a_copy_waits_for_the_computation_that_reads_its_place() -> None:
    """Events of the computation are those of blocks that have run, and one when the places are first filled."""
    queues = Watched()
    model, _ = held(TINY, WeightPlan(evenly(6, 6)), queues=queues)
    velocities(model, TINY)
    places = [address for address, _ in queues.copies[:2]]
    assert len(set(places)) == 2
    expected = [(places[0], 1), (places[1], 1)]
    expected += [(places[index % 2], 2 + index) for index in range(12)]  # the block that has just run gives its place
    assert queues.copies == expected


@pytest.mark.parametrize("num_copied", [3, 4, 6])
def test_copies_begin_as_early_as_they_can(num_copied: int) -> None:
    """Right when a place is let go of, so before the block in the other place runs: one block ahead at least."""
    timeline: list[TransferEvent] = []
    model, weights = held(TINY, WeightPlan(evenly(6, num_copied)), timeline=timeline)
    velocities(model, TINY, 3)
    assert weights.stream is not None and weights.stream.out_of_turn == 0
    expected = [("to device", 0), ("to device", 1)]
    for _ in range(3):
        for block in range(num_copied):
            expected += [("needed", block), ("released", block), ("to device", (block + 2) % num_copied)]
    assert [(event.action, event.layer) for event in timeline] == expected


@pytest.mark.parametrize("name", MODELS)
def test_bytes_that_are_copied_and_held(name: str) -> None:
    wan, blocks = MODELS[name]
    plan = WeightPlan(evenly(blocks, 4))
    model, weights = held(wan, plan)
    most: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: most.append(on_device(model, weights)))
    velocities(model, wan)
    assert weights.stream is not None
    copied = sum(weights.blocks[plan.copied[n]].num_bytes * c for n, c in weights.stream.copies.items())
    ahead = sum(weights.blocks[plan.copied[n]].num_bytes for n in (0, 1))
    assert copied == 2 * plan.copied_bytes(weights.blocks) + ahead
    whole = sum(p.numel() * 4 for p in plain(wan).parameters())
    assert weights.device_bytes - slack(weights) == max(most) < whole


def on_device(model: Any, weights: Any) -> int:
    """Bytes of the places, and of the parameters that are in none of them."""
    places = weights.stream._places
    inside = {place.memory.untyped_storage().data_ptr() for place in places}
    held = [p for p in model.parameters() if p.device.type != "meta"]
    outside = sum(p.numel() * p.itemsize for p in held if p.untyped_storage().data_ptr() not in inside)
    return outside + sum(place.memory.nbytes for place in places)


def slack(weights: Any) -> int:
    """What aligning the parameters of blocks that stay is counted for, and does not take."""
    staying = [n for n in range(len(weights.blocks)) if n not in weights.plan.copied]
    return sum(weights.blocks[n].num_bytes - 4 * weights.blocks[n].num_parameters for n in staying)


def test_forwards_make_no_memory_for_weights() -> None:
    made: list[int] = []

    class Counting(HostQueues):
        def host_memory(self, num_bytes: int) -> Tensor:
            made.append(num_bytes)
            return super().host_memory(num_bytes)

        device_memory = host_memory

    seen: Counter[int] = Counter()
    model, weights = held(TINY, FILES, queues=Counting())
    blocks = weights.blocks
    assert sum(made) == weights.plan.host_bytes(blocks) + 2 * weights.plan.place_bytes(blocks)
    made.clear()
    for block in model.blocks_in_order():
        block.register_forward_pre_hook(lambda b, _: seen.update(p.data_ptr() for p in b.parameters()))
    velocities(model, TINY, 1)
    first = set(seen)
    velocities(model, TINY, 3)
    assert set(seen) == first and made == []


def test_a_forward_that_fails_leaves_the_next_one_right() -> None:
    model, weights = held(TINY, FILES, queues=LateQueues())
    expected = velocities(plain(TINY), TINY)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.blocks["3"].ffn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        velocities(model, TINY)
    handle.remove()
    assert same(velocities(model, TINY), expected)
    assert weights.stream is not None and weights.stream.out_of_turn == 1


def test_a_file_that_cannot_be_read_is_told_where_it_is_needed() -> None:
    damaged: list[str] = []

    def again(name: str, target: Tensor) -> None:
        if damaged:
            raise DataError("DATA-022", f"{name} is damaged.", "Copy it again.")
        write(name, target)

    model, _ = held(TINY, FILES, values=WeightValues(write, again))
    velocities(model, TINY, 1)
    damaged.append("now")
    with pytest.raises(DataError, match=r"blocks\.\d\.[\w.]+ is damaged"):
        velocities(model, TINY, 2)
    damaged.clear()
    assert same(velocities(model, TINY), velocities(plain(TINY), TINY))


def test_streamed_weights_are_not_trained() -> None:
    plan = WeightPlan(evenly(6, 6))
    model, _ = held(TINY, plan)
    expected = velocities(plain(TINY), TINY, 1)[0]
    assert torch.equal(model.velocity(**inputs(TINY)), expected)  # nothing asks for a gradient
    given = inputs(TINY)
    with pytest.raises(ConfigError) as caught:
        model.velocity(**{**given, "text": given["text"].requires_grad_()})
    assert caught.value.problems[0].id == "CFG-370"
    model.requires_grad_()
    with pytest.raises(ConfigError, match="CFG-370"):
        model.velocity(**inputs(TINY))
    with torch.no_grad():
        assert torch.equal(model.velocity(**inputs(TINY)), expected)


def test_a_model_that_is_trained_is_not_held() -> None:
    with torch.device("meta"):
        model = WanModel(TINY)
    with pytest.raises(ConfigError, match="CFG-370"):
        hold_weights(model, WeightPlan(), select("cpu"), WeightValues(write, write))


def test_nobody_computes_with_weights_that_wait() -> None:
    model, _ = held(TINY, WeightPlan(evenly(6, 6)))
    velocities(model, TINY)
    assert {p.device.type for block in model.blocks_in_order() for p in block.parameters()} == {"meta"}
    assert model.head.head.weight.device.type == "cpu"
