"""Each inference script in tiny mode, on two processes that share a clip; and rows that cannot be used."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ranks import ANY_PORT

from mm.cli.demo import main as write_demo
from mm.cli.entry import run
from mm.cli.generate import main
from mm.demo.components import MODEL_NAMES

EXAMPLES = Path(__file__).parents[2] / "examples/wan2.1"
FEW = ["--num-inference-steps", "2", "--device", "cpu", "--no-progress-bar"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default with two rows of everything."""
    home = tmp_path_factory.mktemp("workspace") / "demo"
    write_demo(["--out", str(home)])
    videos = sorted((home / "dataset/videos").iterdir())
    (home / "videos.txt").write_text("".join(f"{video}\n" for video in videos))
    for file in home.glob("*.txt"):
        file.write_text("\n".join(file.read_text().splitlines()[:2]) + "\n")
    return home


def files(home: Path, task: str) -> Path:
    """inference_model.json of a task; video to video takes that of text to video."""
    return home / "configs" / ("" if task in ("t2v", "v2v") else task) / "inference_model.json"


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("1.3b/t2v", marks=pytest.mark.nightly),
        pytest.param("14b/t2v", marks=pytest.mark.nightly),
        pytest.param("1.3b/i2v", marks=pytest.mark.nightly),
        pytest.param("14b/i2v", marks=pytest.mark.nightly),
        pytest.param("14b/flf2v", marks=pytest.mark.nightly),
        pytest.param("1.3b/v2v", marks=pytest.mark.nightly),
        pytest.param("14b/v2v", marks=pytest.mark.nightly),
    ],
)
def test_script_on_two_processes(home: Path, tmp_path: Path, script: str) -> None:
    task = script.split("/")[1]
    model = "t2v" if task == "v2v" else task
    environment = os.environ | {
        "NPUS_PER_NODE": "2", "CP": "2", "MASTER_PORT": ANY_PORT, "MM_MODEL": str(files(home, task)),
        "LOAD_PATH": str(home / f"weights/Wan2.1-{model.upper()}-Tiny-Diffusers/transformer"),
        "SAVE_PATH": str(tmp_path / "clips"),
    }  # fmt: skip
    words = [*FEW, *(["--strength", "0.5"] if task == "v2v" else [])]
    if task == "v2v":
        environment["VIDEO"] = str(home / "videos.txt")
    done = subprocess.run(
        ["bash", str(EXAMPLES / script / "inference.sh"), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / "clips").glob("*.mp4")) == ["video_0000.mp4", "video_0001.mp4"]
    about = json.loads((tmp_path / "clips/video_0001.json").read_text())
    assert (about["task"], about["layout"]) == (task, "cp2(u2)")
    assert about["prompt"] == (home / "prompts.txt").read_text().splitlines()[1]
    given = {"i2v": "images", "flf2v": "images", "v2v": "video"}.get(task)
    assert len({"images", "video"} & about.keys()) == (given is not None)
    if given == "images":
        assert len(about["images"]) == (2 if task == "flf2v" else 1)
        assert all(len(image["fingerprint"]) == 16 for image in about["images"])


FAMILY = {"control": "fun_control", "control_ref": "fun_control_ref", "camera": "fun_camera", "ti2v_5b": "ti2v"}
"""Folders of scripts, and the task of their models; of the others it is the folder's name."""
GIVEN = {
    "control": {"controls"},
    "control_ref": {"controls", "references"},
    "camera": {"images", "camera"},
    "vace": {"video", "masks", "references"},
    "speedcontrol": {"columns"},
    "ti2v_5b": {"images"},
}
"""Folders of scripts, and what is beside the prompt of their clips."""


def clips_of(script: Path, home: Path, task: str, out: Path, *words: str, **variables: str) -> list[dict[str, Any]]:
    """What is beside the two clips that a script makes on two processes, which share them."""
    environment = {
        "NPUS_PER_NODE": "2", "MASTER_PORT": ANY_PORT, "MM_MODEL": str(files(home, task)),
        "LOAD_PATH": str(home / "weights" / MODEL_NAMES[task] / "transformer"), "SAVE_PATH": str(out),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(script / "inference.sh"), *FEW, *words], env=os.environ | environment | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in out.glob("*.mp4")) == ["video_0000.mp4", "video_0001.mp4"]
    return [json.loads((out / f"video_000{row}.json").read_text()) for row in range(2)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "script",
    [
        *(f"{size}/{name}" for size in ("1.3b", "14b") for name in ("control", "control_ref", "camera", "vace")),
        "1.3b/speedcontrol",
        "../wan2.2/ti2v_5b",
    ],
)
def test_script_of_the_family_on_two_processes(home: Path, tmp_path: Path, script: str) -> None:
    name = script.split("/")[-1]
    task = FAMILY.get(name, name)
    rows = clips_of(EXAMPLES / script, home, task, tmp_path / "clips", CP="2")
    everything = {"images", "controls", "references", "masks", "video", "camera", "columns"}
    for index, row in enumerate(rows):
        assert (row["task"], row["layout"]) == (task, "cp2(u2)")
        assert row["prompt"] == (home / "prompts.txt").read_text().splitlines()[index]
        assert everything & row.keys() == GIVEN[name]


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_script_of_inpainting_in_its_three_ways(home: Path, tmp_path: Path, size: str) -> None:
    """A first frame, a video and its mask, or nothing: by variables alone, with the lists left out of the file."""
    values = json.loads(files(home, "i2v").read_text())
    del values["image"]
    (tmp_path / "model.json").write_text(json.dumps(values))
    lists = {name: str(home / f"{name}.txt") for name in ("images_i2v", "videos", "masks")}
    ways: list[tuple[set[str], list[str], dict[str, str]]] = [
        ({"images"}, [], {"IMAGE": lists["images_i2v"]}),
        ({"video", "masks"}, [], {"VIDEO": lists["videos"], "MASK": lists["masks"]}),
        ({"text_only"}, ["--text-only"], {"IMAGE": ""}),
    ]
    for given, words, variables in ways:
        told = {"MM_MODEL": str(tmp_path / "model.json"), "CP": "2", **variables}
        out = tmp_path / "_".join(sorted(given))
        for row in clips_of(EXAMPLES / size / "fun_inp", home, "i2v", out, *words, **told):
            assert {"images", "video", "masks", "text_only"} & row.keys() == given


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "task"), [("t2v_a14b", "t2v"), ("i2v_a14b", "wan22_i2v")])
def test_script_of_two_experts(home: Path, tmp_path: Path, name: str, task: str) -> None:
    """Both on two processes that share their width, with the shipped boundary and guidance."""
    script = EXAMPLES.parent / "wan2.2" / name
    values, shipped = (json.loads(file.read_text()) for file in (files(home, task), script / "inference_model.json"))
    values |= {"low_noise": shipped["low_noise"]}
    values["diffusion"] |= {"guidance_scale": shipped["diffusion"]["guidance_scale"]}
    (tmp_path / "model.json").write_text(json.dumps(values))
    weights = home / "weights" / MODEL_NAMES[task] / "transformer"
    shutil.copytree(weights, tmp_path / "low")
    told = {"MM_MODEL": str(tmp_path / "model.json"), "LOW_NOISE": str(tmp_path / "low")}
    for row in clips_of(script, home, task, tmp_path / "clips", **told):
        assert (row["task"], row["layout"], row["low_noise"]["path"]) == (task, "tp2", str(tmp_path / "low"))
        assert row["low_noise"]["boundary"] == {"t2v": 0.875, "wan22_i2v": 0.9}[task]
        assert (row["guidance_scale"], row["low_noise"]["guidance_scale"]) == {
            "t2v": (4.0, 3.0), "wan22_i2v": (3.5, 3.5),
        }[task]  # fmt: skip


def generate(home: Path, task: str, save: Path, *words: str) -> int:
    return run(main, ["--mm-model", str(files(home, task)), "--save-path", str(save), *FEW, *words])


def errors(capfd: pytest.CaptureFixture[str]) -> list[str]:
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]
    assert all(" Fix: " in line for line in lines)
    return [line.split()[1].rstrip(":") for line in lines]


def test_a_bad_row_does_not_lose_the_others(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = (home / "images_i2v.txt").read_text().splitlines()[0]
    (tmp_path / "torn.png").write_bytes(Path(good).read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    rows = ["", str(tmp_path / "torn.png"), good, "/nowhere/first.png", str(tmp_path / "text.png"), "", good]
    prompts = ["a red disc", "b", "a blue disc moves up", "d", "e", "", ""]
    (tmp_path / "images.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")  # the last prompt is blank
    words = ["--prompt", str(tmp_path / "prompts.txt"), "--image", str(tmp_path / "images.txt")]
    assert generate(home, "i2v", tmp_path / "clips", *words) == 65
    assert errors(capfd) == ["DATA-084"]  # blank last lines are none
    (tmp_path / "images.txt").write_text("\n".join(rows[:5]) + "\n")
    assert generate(home, "i2v", tmp_path / "clips", *words) == 65
    assert errors(capfd) == ["DATA-085", "DATA-086", "DATA-001", "DATA-086"]
    assert [path.name for path in (tmp_path / "clips").glob("*.mp4")] == ["video_0002.mp4"]
    assert json.loads((tmp_path / "clips/video_0002.json").read_text())["prompt"] == prompts[2]


@pytest.mark.parametrize(
    ("task", "rows", "ids"),
    [
        ("flf2v", "one.png", ["DATA-085"]),
        ("flf2v", "one.png, two.png, three.png", ["DATA-085"]),
        ("flf2v", "one.png,", ["DATA-085"]),
        ("i2v", "nowhere.png", ["DATA-001"]),
        ("i2v", "", ["DATA-054"]),
    ],
)
def test_images_that_cannot_work(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], task: str, rows: str, ids: list[str]
) -> None:
    (tmp_path / "rows.txt").write_text(rows + "\n")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    words = ["--prompt", str(tmp_path / "prompts.txt"), "--image", str(tmp_path / "rows.txt")]
    assert generate(home, task, tmp_path / "clips", *words) == 65
    assert errors(capfd) == ids
    assert not (tmp_path / "clips").exists()


def test_an_i2v_model_is_given_both_frames(home: Path, tmp_path: Path) -> None:
    """The last frame reaches it through the latents alone: it changes the clip, the image features are of the first."""
    values = json.loads(files(home, "i2v").read_text())
    values["pipeline_config"]["dual_image"] = True
    (tmp_path / "model.json").write_text(json.dumps(values))
    pairs = (home / "images_flf2v.txt").read_text()
    (tmp_path / "swapped.txt").write_text("".join(", ".join(p.split(", ")[::-1]) + "\n" for p in pairs.splitlines()))
    clips = []
    for name, rows in (("both", home / "images_flf2v.txt"), ("swapped", tmp_path / "swapped.txt")):
        words = ["--mm-model", str(tmp_path / "model.json"), "--image", str(rows), "--save-path", str(tmp_path / name)]
        assert run(main, [*words, *FEW]) == 0
        clips.append((tmp_path / name / "video_0000.mp4").read_bytes())
        about = json.loads((tmp_path / name / "video_0000.json").read_text())
        assert (about["task"], len(about["images"])) == ("flf2v", 2)
    assert clips[0] != clips[1]


def test_a_video_that_is_too_short(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--video", str(home / "videos.txt"), "--strength", "0.5", "--input-size", "13", "64", "64"]
    assert generate(home, "v2v", tmp_path / "clips", *words) == 65
    assert errors(capfd) == ["DATA-087", "DATA-087"]


def test_a_video_of_an_unknown_codec_keeps_no_other_row_back(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three rows the last, whose name looks like a protocol's, is made, with the bytes it has without the others."""
    monkeypatch.chdir(tmp_path)
    good = Path((home / "videos.txt").read_text().splitlines()[0]).read_bytes()
    assert b"avc1" in good
    Path("unknown.mp4").write_bytes(good.replace(b"avc1", b"zzzz"))
    Path("clip.mp4").write_bytes(good)
    Path("list.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    Path("2024-01-01T12:30:05.mp4").write_bytes(good)
    Path("prompts.txt").write_text("one\ntwo\nthree\n")
    words = ["--prompt", "prompts.txt", "--strength", "0.5", "--video", "videos.txt"]
    Path("videos.txt").write_text("unknown.mp4\nlist.mp4\n2024-01-01T12:30:05.mp4\n")
    assert generate(home, "v2v", tmp_path / "clips", *words) == 65
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error ")]
    assert [line.split(" ", 4)[1:4] for line in said] == [["DATA-097:", "Row", "0:"], ["DATA-099:", "Row", "1:"]]
    assert [path.name for path in (tmp_path / "clips").glob("*.mp4")] == ["video_0002.mp4"]
    Path("videos.txt").write_text("2024-01-01T12:30:05.mp4\n" * 3)
    assert generate(home, "v2v", Path("12:30"), *words) == 0
    made, again = (folder / "video_0002.mp4" for folder in (tmp_path / "clips", tmp_path / "12:30"))
    assert made.read_bytes() == again.read_bytes()


def test_an_image_encoder_of_another_model(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = json.loads(files(home, "i2v").read_text())
    values["predictor"] |= {"img_dim": 48}
    (tmp_path / "model.json").write_text(json.dumps(values))
    words = ["--mm-model", str(tmp_path / "model.json"), "--save-path", str(tmp_path / "clips"), *FEW]
    assert run(main, words) == 64
    assert errors(capfd) == ["CFG-065"]  # the weights know their width
    words += ["--load", str(home / "weights/Wan2.1-T2V-Tiny-Diffusers/transformer")]
    assert run(main, words) == 64
    assert set(errors(capfd)) == {"CFG-065"}
