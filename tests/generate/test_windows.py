"""Windows over latent frames: their weights against the numbers of another system, and what a window sees."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tea_cache import features_of, model_of
from torch import Tensor

from mm.generate.windows import Windowed, WindowSettings, frames_of, windows_of
from mm.wan.conditions.first_frame import with_given_frame
from mm.wan.inputs import ModelInputs

FRAMES = 7


def test_windows_and_weights_are_those_of_diffsynth() -> None:
    folder = os.environ.get("MM_ORACLES")
    if not folder:
        pytest.skip("MM_ORACLES is not set; it names the folder of numbers of other systems")
    rows = json.loads((Path(folder) / "sliding_window.json").read_text())["rows"]
    assert len(rows) == 10
    for row in rows:
        found = windows_of(row["frames"], WindowSettings(row["window"], row["stride"]))
        assert [(one.start, one.end) for one in found] == [(one["start"], one["end"]) for one in row["windows"]]
        for ours, theirs in zip(found, row["windows"], strict=True):
            assert ours.weights.tolist() == pytest.approx(theirs["weights"], abs=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("frames", [1, 4, 5, 11])
def test_weights_add_up_to_one(frames: int, stride: int) -> None:
    total = torch.zeros(frames)
    for window in windows_of(frames, WindowSettings(3, stride)):
        assert window.end - window.start <= 3 and (window.weights > 0).all()
        total[window.start : window.end] += window.weights
    torch.testing.assert_close(total, torch.ones(frames))


def inputs_of(wan: Any, in_front: int = 0) -> ModelInputs:
    source = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, in_front + FRAMES, 4, 6, generator=source)
    text = torch.randn(1, wan.text_len, wan.text_dim, generator=source)
    features = features_of(wan, in_front + FRAMES)
    return ModelInputs(latents, torch.tensor([700.0]), text, features)


CUT = {
    "t2v": set(),
    "i2v": {"condition"},
    "fun_control": {"condition"},
    "fun_control_ref": {"condition"},
    "fun_camera": {"condition", "camera"},
    "vace": {"vace_context"},
    "speedcontrol": set(),
}
"""Features of each task that have an axis of frames."""


@pytest.mark.parametrize("task", CUT)
def test_a_window_sees_its_frames_of_every_condition(task: str) -> None:
    model = model_of(task)
    inputs, seen = inputs_of(model.config), []

    def recorded(part: ModelInputs) -> Tensor:
        seen.append(part)
        return model(part)

    velocity = Windowed(recorded, model.config, WindowSettings(3, 2))(inputs)
    assert velocity.shape == inputs.latents.shape
    starts = [0, 2, 4]
    assert [part.latents.shape[2] for part in seen] == [3, 3, 3]  # never more than a window
    by_hand = torch.zeros_like(inputs.latents)
    halves = torch.tensor([1, 1, 0.5]), torch.tensor([0.5, 1, 0.5]), torch.tensor([0.5, 1, 1])
    for start, part, weights in zip(starts, seen, halves, strict=True):
        rows = slice(start, start + 3)
        features = {name: value[:, :, rows] if name in CUT[task] else value for name, value in inputs.features.items()}
        assert all(torch.equal(part.features[name], value) for name, value in features.items())
        # a clip of its own: positions begin at 0
        alone = model.velocity(inputs.latents[:, :, rows], inputs.timestep, inputs.text, **features)
        by_hand[:, :, rows] += weights.view(-1, 1, 1) * alone
    torch.testing.assert_close(velocity, by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["t2v", "vace"])
def test_one_window_is_the_clip_itself(task: str) -> None:
    model = model_of(task)
    inputs = inputs_of(model.config)
    assert torch.equal(Windowed(model, model.config, WindowSettings(FRAMES, 2))(inputs), model(inputs))


def test_every_window_sees_the_references_in_front() -> None:
    model = model_of("vace")
    inputs, seen = inputs_of(model.config, in_front=2), []

    def recorded(part: ModelInputs) -> Tensor:
        seen.append(part)
        return torch.full_like(part.latents, float(len(seen)))

    velocity = Windowed(recorded, model.config, WindowSettings(4, 3), in_front=2)(inputs)
    frames = [[0, 1, 2, 3, 4, 5], [0, 1, 5, 6, 7, 8]]
    assert [part.latents.shape[2] for part in seen] == [6, 6]
    for part, which in zip(seen, frames, strict=True):
        assert torch.equal(part.latents, inputs.latents[:, :, which])
        assert torch.equal(part.features["vace_context"], inputs.features["vace_context"][:, :, which])
    assert velocity[0, 0, :, 0, 0].tolist() == pytest.approx([1.5, 1.5, 1, 1, 1, 1.5, 2, 2, 2])


def test_only_the_first_window_has_the_clean_first_frame() -> None:
    wan = model_of("t2v").config
    inputs = inputs_of(wan)
    given = with_given_frame(inputs, torch.zeros(1, 16, 1, 4, 6), wan.patch_size)
    assert given.runs == (6, 36)
    first, second = frames_of(given, range(3), wan), frames_of(given, range(2, 5), wan)
    assert (first.runs, first.timestep.tolist()) == ((6, 12), [[0, 700]])
    assert (second.runs, second.timestep.tolist()) == ((), [700])
    assert (first.latents[:, :, 0] == 0).all() and torch.equal(second.latents, inputs.latents[:, :, 2:5])
