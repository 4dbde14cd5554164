"""What docs/quickstart.md says of images: from videos to clips that begin, and end, with given images."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_example_scripts import EXAMPLES, bash

from mm.cli import demo as demo_command
from mm.demo.components import MODEL_NAMES
from mm.demo.measure import measure_clip, read_caption

STEPS = "300"


def decibels(found: np.ndarray, given: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two pictures in 0..255."""
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - given).mean()))


def frames_of(path: Path) -> np.ndarray:
    """uint8 [9, 64, 64, 3] of a generated clip."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.nightly
@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_clips_begin_with_the_image_and_obey_the_caption(tmp_path: Path, task: str) -> None:
    home = tmp_path / "demo"
    demo_command.main(["--out", str(home), "--clips-per-caption", "6"])
    configs, weights = home / "configs" / task, home / "weights" / MODEL_NAMES[task]
    one = {"NPUS_PER_NODE": "1", "OMP_NUM_THREADS": "1", "LOG_DIR": str(tmp_path / "logs"), "TASK": task}
    extraction = {"MM_DATA": "data.json", "MM_MODEL": "model_wan.json", "MM_TOOL": "tools.json"}
    bash(
        EXAMPLES / "feature_extract" / "feature_extraction.sh",
        timeout_s=200,
        **one,
        **{name: str(configs / file) for name, file in extraction.items()},
    )
    bash(
        EXAMPLES / "1.3b" / "i2v" / "pretrain.sh",
        *("--train-iters", STEPS, "--lr", "2e-3", "--min-lr", "2e-5", "--lr-decay-style", "cosine"),
        *("--lr-warmup-iters", "100", "--log-interval", "100", "--num-workers", "1"),
        timeout_s=500,
        **one,
        MM_DATA=str(configs / "feature_data.json"),
        MM_MODEL=str(configs / "pretrain_model.json"),
        PRECISION="fp32",
        MBS="16",
        RECOMPUTE="",
        LOAD_PATH=str(weights / "transformer"),
        SAVE_PATH=str(tmp_path / "run"),
    )
    bash(
        EXAMPLES / {"i2v": "1.3b/i2v", "flf2v": "14b/flf2v"}[task] / "inference.sh",
        timeout_s=200,
        **one,
        MM_MODEL=str(configs / "inference_model.json"),
        LOAD_PATH=str(tmp_path / "run"),
        SAVE_PATH=str(tmp_path / "clips"),
        MBS="4",
    )
    prompts = (home / "prompts.txt").read_text().splitlines()
    lines = (home / f"images_{task}.txt").read_text().splitlines()
    obeyed, begins, ends = 0, [], []
    for index, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
        images = [Image.open(path) for path in line.split(", ")]
        frames = frames_of(tmp_path / "clips" / f"video_{index:04d}.mp4")
        obeyed += measure_clip(frames) == read_caption(prompt)
        begins.append(decibels(frames[0], np.asarray(images[0])))
        ends.append(decibels(frames[-1], np.asarray(images[-1])))
    print(f"{task}: {obeyed} of 16 obey; first frame {np.mean(begins):.1f} dB, at least {min(begins):.1f} dB")
    assert obeyed >= 14
    assert min(begins) > 28
    if task == "flf2v":
        print(f"last frame {np.mean(ends):.1f} dB, at least {min(ends):.1f} dB")
        assert min(ends) > 25
