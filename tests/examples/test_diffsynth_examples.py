"""The examples of DiffSynth-Studio's guide: one table's files, started as they stand on tiny models."""

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import ANY_PORT
from released import released_config, write_common_files, write_release
from safetensors.torch import load_file, save_file

from mm.demo.video import write_video
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.underscored import read_flags
from mm.poses import direction_rows
from mm.wan.model import whole_shapes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "wanvideo"
CLIP = (5, 32, 48)
TASKS = {
    "T2V": "t2v", "I2V": "i2v", "FLF2V": "flf2v", "InP": "i2v", "Camera": "fun_camera",
    "V1.1-1.3B-Control": "fun_control_ref", "V1.1-14B-Control": "fun_control_ref", "Control": "fun_control",
    "VACE": "vace",
}  # fmt: skip
"""Tasks of the releases by a word of their names; the first that fits counts."""


def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("table", ROOT / "tools" / "write_diffsynth_examples.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["table"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


TABLE = table()
TITLES = [model.title for model in TABLE.MODELS]


def task_of(name: str) -> str:
    first = ("Camera", "V1.1-1.3B-Control", "V1.1-14B-Control", "Control", "InP", "VACE", "FLF2V", "I2V", "T2V")
    return next(TASKS[word] for word in first if word in name)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that scripts are started in: `models` and the example data set, both tiny."""
    folder = tmp_path_factory.mktemp("wanvideo")
    write_common_files(folder / "models")
    for model in TABLE.MODELS:
        if model.adapter_of is None:
            write_release(folder / "models", model.model_id, task_of(model.title))
    motion = {
        name.removeprefix("motion_controller."): torch.zeros(shape)
        for name, shape in whole_shapes(released_config("speedcontrol")).items()
        if name.startswith("motion_controller.")
    }
    speed = folder / "models" / TABLE.MODELS[-1].model_id
    speed.mkdir(parents=True)
    save_file(motion, speed / "model.safetensors")
    write_data(folder / TABLE.DATA)
    return folder


def write_data(folder: Path) -> None:
    """Two videos with all that any model is given beside them."""
    folder.mkdir(parents=True)
    source = np.random.default_rng(0)
    rows = []
    for name in ("video1", "video2"):
        for video in (f"{name}.mp4", f"{name}_softedge.mp4"):
            write_video(folder / video, source.integers(0, 255, (*CLIP, 3), dtype=np.uint8), 8)
        Image.fromarray(source.integers(0, 255, (*CLIP[1:], 3), dtype=np.uint8)).save(folder / f"{name}.png")
        lines = (" ".join(f"{number:.9g}" for number in row) for row in direction_rows("Left", CLIP[0]).tolist())
        (folder / f"{name}.txt").write_text("\n" + "\n".join(lines) + "\n")
        rows.append(
            {
                "video": f"{name}.mp4",
                "prompt": "a dog is running",
                "control_video": f"{name}_softedge.mp4",
                "reference_image": f"{name}.png",
                "vace_video": f"{name}_softedge.mp4",
                "vace_reference_image": f"{name}.png",
                "camera": f"{name}.txt",
                "motion_bucket_id": "50",
            }
        )
    for model in TABLE.MODELS:
        columns = ["video", "prompt", *model.keys, *(["motion_bucket_id"] if model.adapter_of else [])]
        with (folder / model.metadata).open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def train(home: Path, script: Path, output: str, *more: str, processes: int = 1) -> None:
    """Start a script in tiny mode."""
    launched = f"--num_processes {processes} --main_process_port {ANY_PORT}"
    if "--config_file" not in script.read_text():
        launched += " --multi_gpu" if processes > 1 else " --cpu"
    tiny = ["--height", "32", "--width", "48", "--num_frames", "5", "--dataset_repeat", "1", "--output_path", output]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script), *tiny, "--dataset_num_workers", "0", *more], cwd=home,
        env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_ARGS": launched},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_files_are_those_of_the_table() -> None:
    expected = TABLE.files()
    found = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file()}
    assert found - {"model_training/train.py"} == expected.keys()
    for name, text in expected.items():
        assert (EXAMPLES / name).read_text() == text, f"{name}: python tools/write_diffsynth_examples.py"


def test_every_file_that_the_guide_links_is_there() -> None:
    folder = os.environ.get("MM_GUIDES")
    if not folder:
        pytest.skip("MM_GUIDES is not set; it names a folder with diffsynth-wan.md")
    guide = (Path(folder) / "diffsynth-wan.md").read_text()
    links = set(re.findall(r"\]\(\./(model_[^)]+)\)", guide))
    assert len(links) > 60
    assert [link for link in sorted(links) if not (EXAMPLES / link).is_file()] == []
    named = set(re.findall(r"^\|\[([\w.-]+/[\w.-]+)\]", guide, re.MULTILINE))
    assert named == {model.model_id for model in TABLE.MODELS}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("title", TITLES)
def test_arguments_of_scripts_are_read(title: str, kind: str, tmp_path: Path) -> None:
    recorder = tmp_path / "accelerate"
    recorder.write_text('#!/bin/bash\nprintf "%s\\0" "$@" >"$WORDS"\n')
    recorder.chmod(0o755)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WORDS": str(tmp_path / "words")}
    script = EXAMPLES / "model_training" / kind / f"{title}.sh"
    subprocess.run(["bash", str(script)], env={**os.environ, **told}, check=True, timeout=20)
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    at = next(index for index, word in enumerate(words) if word.endswith("train.py"))
    _, read = read_flags(DiffSynthFlags, words[at + 1 :], "train.py", "CFG-389")
    assert read.problems == read.notes == []


@pytest.mark.nightly
def test_a_script_trains(home: Path) -> None:
    script = EXAMPLES / "model_training" / "lora" / "Wan2.1-T2V-1.3B.sh"
    train(home, script, "everyday", "--num_epochs", "1", "--lora_rank", "4")
    assert [path.name for path in (home / "everyday").glob("*.safetensors")] == ["epoch-0.safetensors"]


@pytest.mark.nightly
@pytest.mark.parametrize("title", TITLES)
def test_each_model_is_run_trained_and_looked_at(home: Path, title: str) -> None:
    """All five files of a row: what training writes is what the programs after it load."""
    model = next(model for model in TABLE.MODELS if model.title == title)
    run_tiny(home, EXAMPLES / "model_inference" / f"{model.run_as or title}.py")
    for kind in ("full", "lora"):
        training = EXAMPLES / "model_training"
        output = f"models/train/{title}_{kind}"
        train(home, training / kind / f"{title}.sh", output, processes=2 if kind == "full" else 1)
        config = home / "models" / (model.adapter_of or model.model_id) / "config.json"
        shutil.copy(config, home / output)  # the tiny models' heads are not as wide as the released ones'
        run_tiny(home, training / f"validate_{kind}" / f"{title}.py")
    tensors = load_file(home / "models" / "train" / f"{title}_full" / "epoch-1.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values())


def run_tiny(home: Path, program: Path) -> None:
    """Run a program at a size and length that this machine can do."""
    text = program.read_text()
    for name, value in {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}.items():
        text, count = re.subn(rf"^    {name}=\d+,$", f"    {name}={value},", text, flags=re.MULTILINE)
        assert count == 1
    text = text.replace('device="cuda"', 'device="cpu"').replace("torch.bfloat16", "torch.float32")
    (home / program.name).write_text(text)
    done = subprocess.run(
        [sys.executable, program.name], cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    video = re.search(r'save_video\(clip, "([^"]+)"', text)
    assert video is not None and (home / video[1]).stat().st_size > 0
