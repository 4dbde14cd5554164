"""Wan2.2's TI2V by command and API: rows with a first frame and without, layouts, and what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family import inference_json, noise, pixels, write_image, write_lines, write_transformer
from family import write_video as video_file
from generation_runs import generate_here
from kept_frames import keeping_frames, largest_difference
from ranks import run_ranks
from test_family_generation import PROMPTS, same, seen

import mm
import mm.generate.run
from mm.cli.entry import run
from mm.cli.generate import main
from mm.config.tasks.registry import TASKS
from mm.demo.components import load_vae, write_model
from mm.errors import MMError
from mm.wan.encoders import VideoEncoder
from mm.wan.inputs import ModelInputs

SIZE = (9, 64, 64)
START, VIDEO = noise(3, 64, 64), noise(1, *SIZE)
WEIGHTS = "weights/ti2v"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default's TI2V, of which the encoders are used."""
    folder = tmp_path_factory.mktemp("parts") / "tiny"
    write_model(folder, TASKS["ti2v"])
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Path) -> Path:
    """A folder with a transformer and its files, which the test runs in."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("prompts.txt"), PROMPTS)
    write_image(Path("start.png"), START)
    video_file(Path("video.mkv"), VIDEO)
    wan = write_transformer(Path(WEIGHTS), "ti2v")
    write_json(parts, wan)
    return tmp_path


def write_json(parts: Path, wan: Any, **more: Any) -> None:
    values = inference_json(parts, wan, pipeline_config={"input_size": list(SIZE)}) | more
    Path("model.json").write_text(json.dumps(values))


def words(*more: str) -> list[str]:
    return ["--mm-model", "model.json", "--load", WEIGHTS, "--device", "cpu", "--no-progress-bar", *more]


def by_command(*more: str, folder: str = "clips") -> list[np.ndarray]:
    """Frames as they were before the codec."""
    with keeping_frames(mm.generate.run):
        main(words("--save-path", folder, *more))
    return [np.load(path) for path in sorted(Path(folder).glob("*.npy"))]


def by_api(parts: Path, **more: Any) -> tuple[list[torch.Tensor], list[ModelInputs]]:
    """Frames, and what the model was given call by call."""
    model = mm.load_model(WEIGHTS, dtype="fp32", device="cpu", task="ti2v", text_len=32)
    with seen(model) as calls:
        found = mm.generate_videos(
            model, PROMPTS, mm.Encoders.of(parts, text_dtype="fp32"), size=SIZE, steps=2, seed=7, guidance_scale=4.0,
            negative_prompt="a green disc", **more,
        )  # fmt: skip
    return found, calls


@pytest.mark.parametrize("batched", [False, True])
def test_a_row_may_have_a_first_frame_and_another_none(parts: Path, place: Path, batched: bool) -> None:
    """In every step the given frame is clean and its 4 tokens at timestep 0; such rows do not share a batch."""
    batch = ["--micro-batch-size", "2", *["--batched-guidance"] * batched]
    expected = by_command("--image", write_lines(Path("images.txt"), ["start.png", ""]), *batch)
    found, calls = by_api(parts, images=[START, None], batch_size=2, batched_guidance=batched)
    assert same(found, expected)
    first = VideoEncoder(load_vae(16)).encode(pixels(START)[None, :, None])
    half = len(calls) // 2
    for call in calls[:half]:
        assert call.runs == (4, 8) and not call.timestep[:, 0].any() and bool((call.timestep[:, 1] > 0).all())
        for latents in call.latents[:, :, :1]:
            torch.testing.assert_close(latents, first[0])
    assert all(call.runs == () and call.timestep.shape == (len(call.latents),) for call in calls[half:])
    said = [json.loads(Path(f"clips/video_000{index}.json").read_text()) for index in range(2)]
    assert [len(of.get("images", ())) for of in said] == [1, 0] and {of["task"] for of in said} == {"ti2v"}


def test_text_alone_needs_no_list(parts: Path, place: Path) -> None:
    """No list, and one with nothing in it, are text to video."""
    expected = by_command()
    found, calls = by_api(parts)
    assert same(found, expected) and all(not call.runs for call in calls)
    again = by_command("--image", write_lines(Path("images.txt"), ["", ""]), folder="again")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(again, expected, strict=True))


def test_a_video_is_made_anew_behind_its_first_frame(parts: Path, place: Path) -> None:
    lists = ["--video", write_lines(Path("videos.txt"), ["video.mkv"] * 2), "--strength", "0.5"]
    expected = by_command(*lists, "--image", write_lines(Path("images.txt"), ["start.png"] * 2))
    found, calls = by_api(parts, videos=[VIDEO] * 2, strength=0.5, images=[START] * 2)
    assert same(found, expected)
    assert len(calls) == 4, "half of two steps, for two prompts and both sides of guidance"
    assert all(call.runs == (4, 8) for call in calls)


CONTEXT, TENSOR = ["--context-parallel-size", "2"], ["--tensor-model-parallel-size", "2"]
LAYERZERO = ["--layerzero", "--layerzero-config", "zero.yaml"]


@pytest.mark.parametrize(
    "layout", [CONTEXT, *(pytest.param(one, marks=pytest.mark.nightly) for one in (TENSOR, LAYERZERO))]
)
def test_two_processes_make_the_clips_of_one(place: Path, layout: list[str]) -> None:
    Path("zero.yaml").write_text("zero3_size: 2\n")
    lists = ["--image", write_lines(Path("images.txt"), ["start.png", ""])]
    by_command(*lists, folder="one")
    run_ranks(2, generate_here, str(place), WEIGHTS, [*lists, *layout, "--save-path", "many"])
    assert largest_difference(Path("one"), Path("many")) <= 1  # where rounding to whole numbers is near its edge
    assert len(list(Path("many").glob("*.mp4"))) == 2


def failure(capfd: pytest.CaptureFixture[str], *more: str) -> list[str]:
    assert run(main, words(*more))
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]


def test_what_does_not_fit_is_named(parts: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = ["--image", write_lines(Path("images.txt"), ["start.png", ""])]
    wan = mm.load_model(WEIGHTS, device="cpu", text_len=32).config
    [extra] = failure(capfd, "--text-only")
    assert "CFG-120" in extra and "takes no --text-only" in extra
    write_json(parts, wan, pipeline_config={"input_size": [9, 48, 64]})
    [size] = failure(capfd)
    assert "CFG-061" in size and "no positive multiple of 32. Fix: Use 32 or 64." in size
    forced = wan.model_copy(update={"force_2_1_time_embedding": True})
    write_json(parts, forced)
    [told] = failure(capfd, *images)
    assert "CFG-306" in told and "force_2_1_time_embedding" in told and "--image" in told
    declared = wan.model_copy(update={"model_type": "t2v"})
    write_json(parts, declared)
    assert any("CFG-305" in line and "force_2_1_time_embedding" in line for line in failure(capfd))
    with pytest.raises(MMError, match="CFG-061"):
        mm.generate_videos(mm.load_model(WEIGHTS, device="cpu"), "a", parts, size=(9, 48, 64))


def test_one_timestep_a_sample_makes_the_same_clips_of_text(parts: Path, place: Path) -> None:
    expected = by_command()
    wan = mm.load_model(WEIGHTS, device="cpu", text_len=32).config
    write_json(parts, wan.model_copy(update={"force_2_1_time_embedding": True}))
    found = by_command(folder="forced")
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
