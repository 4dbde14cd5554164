"""Models of the Wan family: the command and the API make the same clips of the conditions that the models know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family import (
    FRAMES,
    SIDE,
    SIZE,
    by_command,
    inference_json,
    noise,
    pixels,
    seen,
    write_image,
    write_lines,
    write_transformer,
)  # fmt: skip
from family import write_video as video_file
from generation_runs import generate_here
from kept_frames import largest_difference
from ranks import run_ranks
from torch import Tensor

import mm
import mm.generate.run
from mm.cli.entry import run
from mm.cli.generate import main
from mm.config.tasks.registry import TASKS
from mm.demo.components import write_model
from mm.errors import MMError
from mm.poses import direction_rows, parse_poses, rows_of_frames
from mm.wan.conditions.camera import View, camera_channels
from mm.wan.conditions.control import control_condition, reference_latents, start_condition
from mm.wan.conditions.inpaint import inpaint_condition
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.vace import vace_context
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder
from mm.wan.inputs import ModelInputs
from mm.wan.model import WanModel

PROMPTS = ["a red disc moves left", "a blue disc moves up"]
CLIP = ClipSize(*SIZE)
CPU = torch.device("cpu")
VIDEO, OTHER, START, REFERENCE = noise(1, *SIZE), noise(2, *SIZE), noise(3, SIDE, SIDE), noise(4, SIDE, SIDE)
MASK = np.zeros(SIZE, np.uint8)
MASK[2:, 8:24, :20] = 255  # the first frame is known
POSES = "https://x\n" + "\n".join(
    f"{step} 0.5 0.9 0.5 0.5 0 0 1 0 0 {0.1 * step} 0 1 0 0 0 0 1 {0.2 * step}" for step in range(4)
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default's VAE, text and image encoder."""
    folder = tmp_path_factory.mktemp("parts") / "tiny"
    write_model(folder, TASKS["i2v"])
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of every kind, which the test runs in."""
    monkeypatch.chdir(tmp_path)
    write_lines(Path("prompts.txt"), PROMPTS)
    for name, frames in {"video.mkv": VIDEO, "other.mkv": OTHER, "short.mkv": VIDEO[:5]}.items():
        video_file(Path(name), frames)
    video_file(Path("mask.mkv"), np.repeat(MASK[..., None], 3, axis=3))
    for name, image in {"start.png": START, "reference.png": REFERENCE, "wide.png": noise(5, 16, 48)}.items():
        write_image(Path(name), image)
    Path("poses.txt").write_text(POSES)
    return tmp_path


def vae(parts: Path) -> VideoEncoder:
    return VideoEncoder.from_pretrained(parts / "vae", "fp32", CPU)


def clip_of(parts: Path, image: np.ndarray) -> Tensor:
    return ImageEncoder.from_pretrained(parts / "image_encoder", "fp32", CPU).encode(pixels(image).unsqueeze(0))[0]


def by_api(parts: Path, task: str, **more: Any) -> tuple[list[Tensor], list[list[ModelInputs]]]:
    """Frames, and what the model was given for each prompt: with the prompt and without, step by step."""
    model = mm.load_model(Path("weights", task), dtype="fp32", device="cpu", task=task, text_len=32)
    with seen(model) as calls:
        found = mm.generate_videos(
            model, PROMPTS, mm.Encoders.of(parts, text_dtype="fp32"), size=SIZE, steps=2, seed=7, guidance_scale=4.0,
            negative_prompt="a green disc", **more,
        )  # fmt: skip
    each = len(calls) // len(PROMPTS)
    return found, [calls[start : start + each] for start in range(0, len(calls), each)]


def same(found: list[Tensor], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) == len(PROMPTS) and all(
        np.array_equal(ours.numpy(), theirs) for ours, theirs in zip(found, expected, strict=True)
    )


def shown(calls: list[ModelInputs]) -> dict[str, Tensor]:
    """The features of one prompt's calls: the same at every step, with the prompt and without."""
    for call in calls[1:]:
        assert call.features.keys() == calls[0].features.keys()
        assert all(torch.equal(call.features[name], calls[0].features[name]) for name in call.features)
    assert len({call.text.sum().item() for call in calls}) == 2
    return {name: value[0] for name, value in calls[0].features.items()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], expected[name]) for name in expected)


NOTHING_SEEN = torch.zeros(257, 32)


def test_control(parts: Path, place: Path) -> None:
    """The second row has no start image."""
    words = ["--control", write_lines(Path("controls.txt"), ["video.mkv", "other.mkv"])]
    expected = by_command(parts, "fun_control", *words, "--image", write_lines(Path("starts.txt"), ["start.png", ""]))
    found, calls = by_api(parts, "fun_control", controls=[VIDEO, "other.mkv"], images=[START, None])
    assert same(found, expected)
    encode = vae(parts).encode
    first = control_condition(encode, CLIP, pixels(VIDEO), pixels(START))
    assert equal(shown(calls[0]), {"condition": first, "image_features": clip_of(parts, START)})
    second = control_condition(encode, CLIP, pixels(OTHER))
    assert equal(shown(calls[1]), {"condition": second, "image_features": NOTHING_SEEN})


def test_control_without_images_needs_no_image_encoder(parts: Path, place: Path) -> None:
    write_transformer(Path("weights/fun_control"), "fun_control")
    encoders = mm.Encoders.of(parts, text_dtype="fp32")
    alone = mm.Encoders(encoders.vae, encoders.text_encoder, encoders.tokenizer, None, "fp32")
    model = mm.load_model("weights/fun_control", dtype="fp32", device="cpu", text_len=32)
    with seen(model) as calls:
        mm.generate_videos(model, "a", alone, controls=[VIDEO], size=SIZE, steps=1, guidance_scale=1.0)
    assert torch.equal(calls[0].features["image_features"][0], NOTHING_SEEN)
    assert not calls[0].features["condition"][0, 16:].any()


def test_control_and_reference(parts: Path, place: Path) -> None:
    """The image encoder sees the reference, else the start image; without a reference its latents are zeros."""
    words = ["--control", write_lines(Path("controls.txt"), ["video.mkv", "other.mkv"])]
    words += ["--image", write_lines(Path("starts.txt"), ["start.png", "start.png"])]
    words += ["--reference", write_lines(Path("references.txt"), ["reference.png", ""])]
    expected = by_command(parts, "fun_control_ref", *words)
    found, calls = by_api(
        parts, "fun_control_ref", controls=[VIDEO, OTHER], images=[START, "start.png"], references=[REFERENCE, None]
    )
    assert same(found, expected)
    encode = vae(parts).encode
    assert equal(
        shown(calls[0]),
        {
            "condition": control_condition(encode, CLIP, pixels(VIDEO), pixels(START)),
            "reference_latents": reference_latents(encode, CLIP, pixels(REFERENCE)),
            "image_features": clip_of(parts, REFERENCE),
        },
    )
    assert equal(
        shown(calls[1]),
        {
            "condition": control_condition(encode, CLIP, pixels(OTHER), pixels(START)),
            "reference_latents": torch.zeros(16, 4, 4),
            "image_features": clip_of(parts, START),
        },
    )
    said = [json.loads(Path(f"clips/video_000{index}.json").read_text()) for index in range(2)]
    assert [of["references"][0]["path"] for of in said if "references" in of] == ["reference.png"]
    assert all(of["task"] == "fun_control_ref" and len(of["controls"]) == len(of["images"]) == 1 for of in said)


def test_camera(parts: Path, place: Path) -> None:
    """A pose file is stretched over the clip; a direction has a speed."""
    words = ["--camera", write_lines(Path("cameras.txt"), ["poses.txt", "LeftUp 0.03"])]
    words += ["--image", write_lines(Path("starts.txt"), ["start.png", "reference.png"])]
    expected = by_command(parts, "fun_camera", *words)
    moved = direction_rows("LeftUp", FRAMES, 0.03)
    found, calls = by_api(parts, "fun_camera", cameras=["poses.txt", moved], images=[START, REFERENCE])
    assert same(found, expected)
    encode, view = vae(parts).encode, View(SIDE, SIDE)
    rows = [rows_of_frames(parse_poses(POSES, "poses"), FRAMES, range(FRAMES)), moved]
    for of_prompt, image, path in zip(calls, (START, REFERENCE), rows, strict=True):
        start = start_condition(encode, CLIP, pixels(image))
        features = {"condition": start, "image_features": clip_of(parts, image), "camera": camera_channels(path, view)}
        assert equal(shown(of_prompt), features)
    assert json.loads(Path("clips/video_0001.json").read_text())["camera"] == "LeftUp 0.03"


def test_edited_video(parts: Path, place: Path) -> None:
    """References may be of any size and number; rows of other numbers do not share a batch. A row may give nothing."""
    words = ["--video", write_lines(Path("videos.txt"), ["video.mkv", ""])]
    words += ["--mask", write_lines(Path("masks.txt"), ["mask.mkv", ""])]
    words += ["--reference", write_lines(Path("references.txt"), ["wide.png, reference.png", ""])]
    expected = by_command(parts, "vace", *words, "--vace-scale", "0.6", "--micro-batch-size", "2")
    wide = noise(5, 16, 48)
    found, calls = by_api(
        parts, "vace", videos=[VIDEO, None], masks=[MASK, None], references=[[wide, "reference.png"], None],
        vace_scale=0.6, batch_size=2,
    )  # fmt: skip
    assert same(found, expected)
    assert [frames.shape for frames in found] == [(FRAMES, SIDE, SIDE, 3)] * 2
    encode = vae(parts).encode
    mask = torch.from_numpy(MASK).float() / 255
    first = vace_context(encode, CLIP, pixels(VIDEO), mask, [pixels(wide), pixels(REFERENCE)])
    for of_prompt, context, frames in ((calls[0], first, 5), (calls[1], vace_context(encode, CLIP), 3)):
        assert equal(shown(of_prompt), {"vace_context": context, "vace_scale": torch.tensor(0.6)})
        assert [call.latents.shape[2] for call in of_prompt] == [frames] * len(of_prompt)
    said = json.loads(Path("clips/video_0000.json").read_text())
    assert said["vace_scale"] == 0.6 and len(said["references"]) == 2 and len(said["masks"]) == 1


def test_first_frame_without_an_image_encoder(parts: Path, place: Path) -> None:
    words = ["--image", write_lines(Path("starts.txt"), ["start.png", "reference.png"])]
    expected = by_command(parts, "wan22_i2v", *words)
    found, calls = by_api(parts, "wan22_i2v", images=[START, "reference.png"])
    assert same(found, expected)
    for of_prompt, image in zip(calls, (START, REFERENCE), strict=True):
        condition = condition_latents(vae(parts).encode, {0: pixels(image).unsqueeze(0)}, FRAMES)[0]
        assert equal(shown(of_prompt), {"condition": condition})


def test_masked_video(parts: Path, place: Path) -> None:
    """The image encoder sees the first frame where all of it is known; an image is a mask of every frame."""
    corner = MASK[-1]
    write_image(Path("mask.png"), corner)
    words = ["--video", write_lines(Path("videos.txt"), ["video.mkv", "other.mkv"])]
    words += ["--mask", write_lines(Path("masks.txt"), ["mask.mkv", "mask.png"])]
    expected = by_command(parts, "i2v", *words)
    found, calls = by_api(parts, "i2v", videos=["video.mkv", OTHER], masks=[MASK, corner])
    assert same(found, expected)
    masks = [torch.from_numpy(MASK).float() / 255, torch.from_numpy(corner).float().expand(*SIZE) / 255]
    features = [clip_of(parts, VIDEO[0]), NOTHING_SEEN]
    for of_prompt, video, mask, seen_frame in zip(calls, (VIDEO, OTHER), masks, features, strict=True):
        condition = inpaint_condition(vae(parts).encode, CLIP, pixels(video), mask)
        assert equal(shown(of_prompt), {"condition": condition, "image_features": seen_frame})


def test_text_alone(parts: Path, place: Path) -> None:
    expected = by_command(parts, "i2v", "--text-only")
    found, calls = by_api(parts, "i2v", text_only=True)
    assert same(found, expected)
    assert not any(value.any() for of_prompt in calls for value in shown(of_prompt).values())
    assert json.loads(Path("clips/video_0001.json").read_text())["text_only"] is True


# --- several processes

ROWS: dict[str, dict[str, list[str]]] = {
    "fun_control": {"control": ["video.mkv", "other.mkv"], "image": ["start.png", ""]},
    "fun_control_ref": {"control": ["video.mkv", "other.mkv"], "reference": ["", "reference.png"]},
    "fun_camera": {"camera": ["poses.txt", "In"], "image": ["start.png", "reference.png"]},
    "vace": {"video": ["video.mkv", ""], "reference": ["wide.png, start.png", ""]},
    "wan22_i2v": {"image": ["start.png", "reference.png"]},
    "i2v": {"video": ["video.mkv", "other.mkv"], "mask": ["mask.mkv", "mask.mkv"]},
}
CONTEXT, TENSOR = ["--context-parallel-size", "2"], ["--tensor-model-parallel-size", "2"]
LAYERZERO = ["--layerzero", "--layerzero-config", "zero.yaml"]
NIGHTLY = [
    (task, words) for task in ROWS for words in (CONTEXT, TENSOR, LAYERZERO) if (task, words) != ("vace", CONTEXT)
]


@pytest.mark.parametrize(
    ("task", "words"),
    [("vace", CONTEXT), *(pytest.param(*one, marks=pytest.mark.nightly) for one in NIGHTLY)],
)  # fmt: skip
def test_two_processes_make_the_clips_of_one(parts: Path, place: Path, task: str, words: list[str]) -> None:
    Path("zero.yaml").write_text("zero3_size: 2\n")
    lists = [word for name, of in ROWS[task].items() for word in (f"--{name}", write_lines(Path(f"{name}.txt"), of))]
    by_command(parts, task, *lists, "--save-path", "one")
    many = [*lists, *words, "--save-path", "many"]
    run_ranks(2, generate_here, str(place), f"weights/{task}", many)
    assert largest_difference(Path("one"), Path("many")) <= 1  # where rounding to whole numbers is near its edge
    assert len(list(Path("many").glob("*.mp4"))) == 2


# --- bad input


def failure(capfd: pytest.CaptureFixture[str], parts: Path, task: str, *words: str) -> list[str]:
    """The error lines of a command that fails."""
    folder = Path("weights", task)
    if not folder.exists():
        write_transformer(folder, task)
    wan = mm.load_model(folder, task=task).config.model_copy(update={"text_len": 32})
    Path("model.json").write_text(json.dumps(inference_json(parts, wan)))
    code = run(
        main, ["--mm-model", "model.json", "--load", str(folder), "--device", "cpu", "--no-progress-bar", *words]
    )
    assert code
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]


def test_media_that_do_not_belong_to_the_model(parts: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All at once, by the words of the command, and with what works."""
    control = ["--control", write_lines(Path("controls.txt"), ["video.mkv"] * 2)]
    [missing] = failure(capfd, parts, "fun_control")
    assert "CFG-120" in missing and "is fun_control, which needs --control." in missing
    [extra] = failure(capfd, parts, "fun_control", *control, "--reference", "controls.txt")
    assert "takes no --reference. Fix: Remove it, or use a model of fun_control_ref or vace." in extra
    [extra] = failure(capfd, parts, "vace", "--camera", "controls.txt")
    assert "takes no --camera. Fix: Remove it, or use a model of fun_camera." in extra
    [extra] = failure(capfd, parts, "fun_control", *control, "--vace-scale", "2")
    assert "CFG-120" in extra and "takes no --vace-scale" in extra
    [strength] = failure(capfd, parts, "vace", "--video", "controls.txt", "--strength", "0.5")
    assert "CFG-121: --strength has no effect on a model that sees --video. Fix: Remove it, or give --in" in strength
    [strength] = failure(capfd, parts, "vace", "--input-video", "controls.txt")
    assert "CFG-121: --input-video is given without --strength." in strength
    [other] = failure(capfd, parts, "fun_control", *control, "--input-video", "controls.txt")
    assert "CFG-120" in other and "Fix: Give it as --video: the clip begins as that." in other
    [ways] = failure(capfd, parts, "i2v", "--image", "controls.txt", "--mask", "m.txt", "--video", "v.txt")
    assert "CFG-280: --image and --mask say each what the model sees of its clip." in ways
    [alone] = failure(capfd, parts, "i2v", "--mask", "controls.txt")
    assert "CFG-120" in alone and "needs --video." in alone
    [later] = failure(capfd, parts, "fun_camera", "--camera", "controls.txt", "--image", "controls.txt", "--text-only")
    assert "takes no --text-only. Fix: Remove it, or use a model of i2v." in later


@pytest.mark.parametrize(
    ("task", "lists", "id", "told"),
    [
        ("fun_control", {"control": ["video.mkv", "short.mkv"]}, "DATA-087", "short.mkv has 5 frames"),
        ("fun_control", {"control": ["", "video.mkv"]}, "DATA-085", "Row 0 has nothing where one control should be"),
        ("fun_camera", {"camera": ["In", "bad.txt"], "image": ["start.png"] * 2}, "CFG-250", "bad.txt line 3 has 18 w"),
        ("fun_camera", {"camera": ["In", "LeftRight"], "image": ["start.png"] * 2}, "CFG-251", "'LeftRight' is no"),
        ("fun_camera", {"camera": ["In", "In fast"], "image": ["start.png"] * 2}, "CFG-257", "speed is 'fast'"),
        ("vace", {"video": ["video.mkv"] * 2, "mask": ["mask.mkv", "wide.png"]}, "CFG-252", "wide.png is 16x48 pixels"),
        ("vace", {"mask": ["mask.mkv", "colours.png"]}, "CFG-281", "colours.png has colours"),
        ("i2v", {"video": ["video.mkv"] * 2, "mask": ["mask.mkv", "missing.png"]}, "DATA-001", "missing.png"),
    ],
)
def test_bad_rows_are_named_and_the_others_made(
    parts: Path, place: Path, capfd: pytest.CaptureFixture[str], task: str, lists: dict[str, list[str]], id: str,
    told: str,
) -> None:  # fmt: skip
    lines = POSES.splitlines()
    Path("bad.txt").write_text("\n".join([*lines[:2], lines[2][:-4], *lines[3:]]))
    write_image(Path("colours.png"), np.full((SIDE, SIDE, 3), (255, 0, 0), np.uint8))
    words = [word for name, of in lists.items() for word in (f"--{name}", write_lines(Path(f"{name}.txt"), of))]
    [error] = failure(capfd, parts, task, *words)
    bad = 0 if "Row 0" in told else 1
    assert id in error and f"Row {bad}" in error and told in error
    assert [path.name for path in Path("clips").glob("*.mp4")] == [f"video_000{1 - bad}.mp4"]


def test_lists_end_with_the_prompts(parts: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A blank line says that a row has none; a line that is not there says nothing."""
    words = ["--control", write_lines(Path("controls.txt"), ["video.mkv"] * 2), "--image", "starts.txt"]
    Path("starts.txt").write_text("start.png\n")
    [error] = failure(capfd, parts, "fun_control", *words)
    assert "DATA-084" in error and "prompts.txt has 2 lines, and starts.txt 1." in error


def test_arguments_that_do_not_belong_to_the_model(place: Path) -> None:
    write_transformer(Path("weights/vace"), "vace")
    write_transformer(Path("weights/i2v"), "i2v")
    edits, frames = (mm.load_model(f"weights/{task}", device="cpu") for task in ("vace", "i2v"))
    nowhere = mm.Encoders.of("nowhere")

    def refused(model: WanModel, **more: Any) -> list[str]:
        with pytest.raises(MMError) as caught:
            mm.generate_videos(model, "a", nowhere, size=SIZE, **more)
        return sorted(problem.id for problem in caught.value.problems)

    assert refused(edits, controls=[VIDEO], text_only=True) == ["CFG-120", "CFG-120"]
    assert refused(edits, videos=[VIDEO], strength=0.5) == ["CFG-121"]
    assert refused(frames, images=[START], text_only=True) == ["CFG-280"]
    assert refused(frames, masks=[MASK]) == ["CFG-120"]
    assert refused(frames, text_only=True, vace_scale=1.0) == ["CFG-120"]
    assert refused(edits, videos=[VIDEO], masks=[MASK[:, :16]]) == ["CFG-252"]
    assert refused(edits, videos=[VIDEO], masks=[MASK.astype(np.float32)]) == ["CFG-200"]
