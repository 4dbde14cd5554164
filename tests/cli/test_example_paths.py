"""The example scripts hand on paths of any characters whole."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "wan2.1" / "1.3b" / "t2v"
TINY = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"


def run(script: str, *words: str, **variables: object) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    given = {name: str(value) for name, value in variables.items()} | {"NPUS_PER_NODE": "1"}
    done = subprocess.run(
        ["bash", SCRIPTS / script, *words], env={**environment, **given}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.nightly
def test_training_and_generation_in_a_folder_of_odd_characters(demo: Path, tmp_path: Path) -> None:
    """`=`, spaces, commas, quotes and what the shell or glob would expand; `run1` is what `run[1]` would match."""
    (tmp_path / "run1").mkdir()
    save, configs = tmp_path / "run[1] = a, 'b' $HOME *?", demo / "configs"
    common = {"MM_DATA": configs / "feature_data.json", "PRECISION": "fp32", "RECOMPUTE": ""}
    words = ["--train-iters", "1", "--num-workers", "0", "--device", "cpu"]
    pretrain = {"MM_MODEL": configs / "pretrain_model.json", "LOAD_PATH": demo / TINY, "SAVE_PATH": save}
    run("pretrain.sh", *words, **common, **pretrain)
    assert (save / "iter_0000001").is_dir() and (save / "train.log").read_text()
    prompts = save / "prompts, [1].txt"
    prompts.write_text("a red circle moving left\n")
    clips = save / "clips {a,b} [1]"
    run(
        "inference.sh", "--num-inference-steps", "1", "--device", "cpu", MM_MODEL=configs / "inference_model.json",
        LOAD_PATH=save, SAVE_PATH=clips, PROMPT=prompts,
    )  # fmt: skip
    assert sorted(path.name for path in clips.iterdir()) == ["video_0000.json", "video_0000.mp4"]
    assert not list((tmp_path / "run1").iterdir())
