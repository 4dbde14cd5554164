"""Clips that begin as a given video, of every model of the family: the noise of the formula, then the model's steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family import FRAMES, SIDE, SIZE, by_command, noise, pixels, seen, write_lines, write_transformer, write_video
from torch import Tensor

import mm
from mm.config.tasks.registry import TASKS
from mm.demo.components import write_model
from mm.generate.pipeline import initial_latents
from mm.wan.encoders import VideoEncoder
from mm.wan.inputs import ModelInputs

CPU = torch.device("cpu")
SHIFT, STEPS, GUIDANCE, STRENGTH = 3.0, 4, 4.0, 0.5
BEGIN, OTHER = noise(1, *SIZE), noise(2, *SIZE)
START, END, WIDE = noise(3, SIDE, SIDE), noise(4, SIDE, SIDE), noise(5, 16, 48)
MASK = np.zeros(SIZE, np.uint8)
MASK[2:, 8:24, :20] = 255

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "t2v": ("t2v", {}),
    "i2v": ("i2v", {"images": [START]}),
    "i2v of two frames": ("i2v", {"images": [[START, END]]}),
    "flf2v": ("flf2v", {"images": [[START, END]]}),
    "Fun-InP with a mask": ("i2v", {"videos": [OTHER], "masks": [MASK]}),
    "Fun-InP of text": ("i2v", {"text_only": True}),
    "fun_control": ("fun_control", {"controls": [OTHER]}),
    "fun_control_ref": ("fun_control_ref", {"controls": [OTHER], "references": [END]}),
    "fun_camera": ("fun_camera", {"images": [START], "cameras": ["Left 0.03"]}),
    "vace": ("vace", {"videos": [OTHER], "masks": [MASK]}),
    "vace with references": ("vace", {"videos": [OTHER], "references": [[WIDE, START]]}),
    "wan22_i2v": ("wan22_i2v", {"images": [START]}),
    "ti2v": ("ti2v", {"images": [START]}),
    "speedcontrol": ("speedcontrol", {"columns": {"motion_bucket_id": [40.0]}}),
}
EVERYDAY = ("Fun-InP of text", "vace with references")
EACH = pytest.mark.parametrize(
    ("task", "given"),
    [pytest.param(*row, id=name, marks=[pytest.mark.nightly] * (name not in EVERYDAY)) for name, row in ROWS.items()],
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default's VAE, text and image encoder."""
    folder = tmp_path_factory.mktemp("parts") / "tiny"
    write_model(folder, TASKS["i2v"])
    return folder


@pytest.fixture(scope="module")
def parts_of_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "ti2v"
    write_model(folder, TASKS["ti2v"])
    return folder


@pytest.fixture
def encoders(request: pytest.FixtureRequest, task: str) -> mm.Encoders:
    folder = request.getfixturevalue("parts_of_ti2v" if task == "ti2v" else "parts")
    return mm.Encoders.of(folder, text_dtype="fp32")


def level(index: int) -> float:
    """Noise level of a step of Euler's method: even steps from 1 to 0, shifted."""
    even = 1 - index / STEPS
    return SHIFT * even / (1 + (SHIFT - 1) * even)


def made(model: Any, encoders: mm.Encoders, **given: Any) -> tuple[Tensor, list[ModelInputs], Tensor]:
    """A clip, what the model was given call by call, and the latents at the end."""
    clean: list[Tensor] = []
    with seen(model) as calls:
        [frames] = mm.generate_videos(
            model, ["a red disc"], encoders, size=SIZE, steps=STEPS, shift=SHIFT, guidance_scale=GUIDANCE, seed=7,
            solver="euler", negative_prompt="", on_step=clean.append, **given,
        )  # fmt: skip
    return frames, calls, clean[-1]


def begun_as(task: str, given: dict[str, Any], strength: float) -> dict[str, Any]:
    """What is given beside the video that the clip begins as; models that see `videos` have another word for it."""
    name = "input_videos" if "videos" in given or task == "vace" else "videos"
    return {**given, name: [BEGIN], "strength": strength}


@EACH
def test_the_whole_strength_is_a_clip_of_noise(
    task: str, given: dict[str, Any], encoders: mm.Encoders, tmp_path: Path
) -> None:
    write_transformer(tmp_path / task, task)
    model = mm.load_model(tmp_path / task, dtype="fp32", device="cpu", task=task, text_len=32)
    expected = made(model, encoders, **given)[0]
    assert torch.equal(made(model, encoders, **begun_as(task, given, 1.0))[0], expected)
    assert not torch.equal(made(model, encoders, **begun_as(task, given, 0.75))[0], expected)


@EACH
def test_a_part_of_it_begins_as_the_formula_says(
    task: str, given: dict[str, Any], encoders: mm.Encoders, tmp_path: Path
) -> None:
    """Then the steps are Euler's, taken by hand, with the features that the model is given without the video."""
    write_transformer(tmp_path / task, task)
    model = mm.load_model(tmp_path / task, dtype="fp32", device="cpu", task=task, text_len=32)
    without = made(model, encoders, **given)[1]
    _, calls, found = made(model, encoders, **begun_as(task, given, STRENGTH))
    begin = int(STEPS * (1 - STRENGTH))
    vae = VideoEncoder.from_pretrained(Path(encoders.vae), "fp32", CPU)  # type: ignore[arg-type]
    clean = vae.encode(pixels(BEGIN).unsqueeze(0))
    in_front = 2 if "references" in given and task == "vace" else 0
    if in_front:
        clean = torch.cat((without[0].features["vace_context"][:, :16, :in_front], clean), dim=2)
    drawn = initial_latents(7, [0], clean.shape[1:])
    latents = (1 - level(begin)) * clean + level(begin) * drawn
    assert len(calls) == 2 * (STEPS - begin) and len(without) == 2 * STEPS
    for call in calls:
        assert call.features.keys() == without[0].features.keys()
        assert all(torch.equal(call.features[name], without[0].features[name]) for name in call.features)
    given_first = without[0].latents[:, :, :1] if task == "ti2v" else None
    for step in range(begin, STEPS):
        velocities = []
        for number in range(2):
            call = calls[2 * (step - begin) + number]
            shown = latents if given_first is None else torch.cat((given_first, latents[:, :, 1:]), dim=2)
            assert torch.allclose(call.latents, shown, atol=1e-5)
            assert float(call.timestep.max()) == pytest.approx(1000 * level(step))
            velocities.append(model(ModelInputs(shown, call.timestep, call.text, call.features, runs=call.runs)))
        velocity = velocities[1] + GUIDANCE * (velocities[0] - velocities[1])
        latents = latents + (level(step + 1) - level(step)) * velocity.float()
    expected = latents[:, :, in_front:]
    if given_first is not None:
        expected = torch.cat((given_first, expected[:, :, 1:]), dim=2)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("task", ["i2v", pytest.param("vace", marks=pytest.mark.nightly)])
def test_the_command_makes_the_same(parts: Path, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image and a video that the clip begins as; a video that is edited and another one."""
    monkeypatch.chdir(tmp_path)
    write_video(Path("begin.mkv"), BEGIN)
    Path("start.txt").write_text("begin.mkv\n")
    write_lines(Path("prompts.txt"), ["a red disc"])
    more: dict[str, Any] = {"pipeline_config": {"input_size": list(SIZE), "strength_steps": "all"}}
    if task == "i2v":
        words, given = ["--text-only", "--video", "start.txt"], {"videos": [BEGIN], "text_only": True}
    else:
        words = ["--video", write_lines(Path("videos.txt"), ["begin.mkv"]), "--input-video", "start.txt"]
        given = {"videos": [BEGIN], "input_videos": [BEGIN]}
    [expected] = by_command(parts, task, *words, "--strength", "0.5", **more)
    model = mm.load_model(f"weights/{task}", dtype="fp32", device="cpu", task=task, text_len=32)
    options = mm.SamplingOptions(strength_steps="all")
    [found] = mm.generate_videos(
        model, ["a red disc"], mm.Encoders.of(parts, text_dtype="fp32"), size=SIZE, steps=2, seed=7, guidance_scale=4.0,
        negative_prompt="a green disc", strength=0.5, options=options, **given,
    )  # fmt: skip
    assert np.array_equal(found.numpy(), expected)
    assert len(expected) == FRAMES
