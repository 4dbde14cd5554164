"""Slices of the schedule for the samples of a step, against VideoX-Fun's slices for ranks."""

import json
import os
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from mm.config.diffusion import DiffusionConfig
from mm.diffusion.flow import FlowMatching, slice_of_step


def test_slices_are_those_of_videox_fun_s_ranks() -> None:
    """Index ranges of all ranks at 16 world sizes, a sample each."""
    place = os.environ.get("MM_ORACLES")
    if not place:
        pytest.skip("MM_ORACLES names no folder of oracles")
    rows = json.loads((Path(place) / "schedules.json").read_text())["videox_fun_rank_slices"]["rows"]
    assert len(rows) == 16
    for row in rows:
        world = row["world"]
        assert [[*slice_of_step(rank, world, 1000)] for rank in range(world)] == row["index_range_of_rank"]


def test_a_sample_draws_from_the_slice_of_its_place_alone() -> None:
    flow = FlowMatching(DiffusionConfig(shift=5.0, timestep_slices="step"))
    for place in range(4):
        sigma, _, _ = flow.draw_timesteps(7, range(200), [0] * 200, [(place, 4)] * 200)
        index = torch.searchsorted(-flow.sigmas, -sigma)
        assert torch.equal(flow.sigmas[index], sigma)
        assert index.min() >= 250 * place and index.max() < 250 * (place + 1)
        assert len(set(index.tolist())) > 100
    whole = FlowMatching(DiffusionConfig(shift=5.0))
    places = [(0, 4)] * 200
    assert torch.equal(
        whole.draw_timesteps(7, range(200), [0] * 200, places)[0], whole.draw_timesteps(7, range(200), [0] * 200)[0]
    )


def test_slices_are_of_the_grid() -> None:
    with pytest.raises(ValidationError, match="timestep_slices has no effect"):
        DiffusionConfig(timestep_sampling="logit_normal", timestep_slices="step")
