"""Conditions that training samples are shown: VideoX-Fun's routing, and that draws are independent and by key."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch

from mm.drops import DropRates, Kept, draw_kept, draw_reference_frame
from mm.errors import ConfigError
from mm.rng import generator
from mm.wan.conditions.routing import v11_control_inputs

NAMES = ("text", "control", "start", "reference", "image")


def test_routing_of_v11(oracles: Path) -> None:
    rows = json.loads((oracles / "control_routing.json").read_text())["rows"]
    assert len(rows) == 16
    for row in rows:
        control, frame = torch.full((16, row["latent_frames"], 4, 6), 2.0), torch.full((16, 4, 6), 3.0)
        dropped = {"none": {}, "full_ref": {"reference": False}}
        kept = Kept(**dropped.get(row["dropped_by_chance"], {row["dropped_by_chance"]: False}))
        condition, reference = v11_control_inputs(control, frame, row["reference_index"], kept)
        assert condition.shape == (32, row["latent_frames"], 4, 6) and reference.shape == (16, 4, 6)
        assert (condition[:16] == 2).all() if row["control_kept"] else not condition[:16].any()
        assert (condition[16:, 0] == 3).all() if row["start_kept"] else not condition[16:, 0].any()
        assert (not condition[16:, 1:].any()) == row["start_other_frames_zero"]
        assert (reference == 3).all() if row["full_ref_kept"] else not reference.any()


@pytest.fixture(scope="module")
def draws() -> list[Kept]:
    rates = DropRates(text=0.1, control=0.2, start=0.3, reference=0.4, image=0.5)
    return [draw_kept(rates, 7, f"clip-{number}", 0) for number in range(4000)]


@pytest.mark.parametrize(("name", "rate"), zip(NAMES, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))
def test_each_is_dropped_at_its_rate(draws: list[Kept], name: str, rate: float) -> None:
    """Within four standard deviations; a rate of another name is off by more."""
    share = sum(not getattr(kept, name) for kept in draws) / len(draws)
    assert abs(share - rate) < 4 * (rate * (1 - rate) / len(draws)) ** 0.5


@pytest.mark.parametrize(("one", "other"), combinations(NAMES, 2))
def test_any_two_are_dropped_independently(draws: list[Kept], one: str, other: str) -> None:
    found = torch.tensor([[getattr(kept, one), getattr(kept, other)] for kept in draws], dtype=torch.float64).t()
    assert abs(float(torch.corrcoef(found)[0, 1])) < 4 / len(draws) ** 0.5


def test_draws_are_by_key() -> None:
    rates = DropRates(*[0.5] * 5)
    found = [draw_kept(rates, seed, name, draw) for seed in (1, 2) for name in range(40) for draw in (0, 1)]
    assert found == [draw_kept(rates, seed, name, draw) for seed in (1, 2) for name in range(40) for draw in (0, 1)]
    assert found[:80] != found[80:] and found[::2] != found[1::2]


def test_captions_are_dropped_as_the_loader_drops_them() -> None:
    for draw in range(50):
        chance = float(torch.rand((), generator=generator(3, "caption_dropout", "clip", draw)))
        assert draw_kept(DropRates(text=0.5), 3, "clip", draw).text == (chance >= 0.5)


def test_rates_of_nothing_and_of_all() -> None:
    none, every = DropRates(*[0.0] * 5), DropRates(*[1.0] * 5)
    for draw in range(20):
        assert draw_kept(none, 0, "a", draw) == Kept()
        assert draw_kept(every, 0, "a", draw) == Kept(*[False] * 5)
    assert DropRates() == DropRates(0.1, 0.1, 0.1, 0.1, 0.1)


def test_the_reference_is_the_first_frame_in_two_of_five() -> None:
    """And any other equally often."""
    found = [draw_reference_frame(5, 0.4, 1, number, 0) for number in range(4000)]
    for index, share in enumerate((0.4, 0.15, 0.15, 0.15, 0.15)):
        assert abs(found.count(index) / len(found) - share) < 4 * (share * (1 - share) / len(found)) ** 0.5
    assert found == [draw_reference_frame(5, 0.4, 1, number, 0) for number in range(4000)]
    assert {draw_reference_frame(5, 1.0, 1, number, 0) for number in range(50)} == {0}
    assert {draw_reference_frame(5, 0.0, 1, number, 0) for number in range(50)} == {1, 2, 3, 4}
    assert {draw_reference_frame(1, 0.0, 1, number, 0) for number in range(5)} == {0}


def test_rates_that_are_none() -> None:
    with pytest.raises(ConfigError) as caught:
        DropRates(text=-0.1, start=1.1, image=float("nan"))
    found = [(problem.id, problem.message) for problem in caught.value.problems]
    assert [(id, message.split()[4]) for id, message in found] == [("CFG-260", n) for n in ("text", "start", "image")]
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="CFG-260"):
            draw_reference_frame(5, rate, 0, "a", 0)
