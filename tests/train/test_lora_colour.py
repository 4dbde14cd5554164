"""A LoRA learns a colour that its base has never seen, for every caption; without it no clip has the colour.

The colour is the fourth of the embedded default, whose clips and captions the base is trained without: others cannot be
decoded by its VAE.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from training_runs import run

from mm.cli import convert as convert_command
from mm.cli import demo as demo_command
from mm.cli import extract as extract_command
from mm.cli import generate as generate_command
from mm.demo.clips import FPS, DemoClip
from mm.demo.measure import read_caption, score
from mm.demo.video import write_video
from mm.generate.rows import read_prompts

NEW = "yellow"
PRETRAINING = {
    "train_iters": 1200, "lr": 2e-3, "min_lr": 2e-5, "lr_decay_style": "cosine", "lr_warmup_iters": 100,
    "micro_batch_size": 12, "log_interval": 100,
}  # fmt: skip
TUNING = {
    "train_iters": 200, "lr": 2e-3, "lr_decay_style": "cosine", "micro_batch_size": 16, "log_interval": 50,
    "lora_r": 16, "lora_alpha": 16.0,
    "lora_target_modules": ["proj_q", "proj_k", "proj_v", "proj_out", "ffn.0", "ffn.2"],
}  # fmt: skip


def write_demo(home: Path) -> None:
    demo_command.main(["--out", str(home)])


def extract(home: Path) -> None:
    configs = home / "configs"
    extract_command.main(
        ["--mm-data", str(configs / "data.json"), "--mm-model", str(configs / "model_wan.json"),
         "--mm-tool", str(configs / "tools.json")]
    )  # fmt: skip


def without_the_new_colour(home: Path) -> None:
    """The embedded default with the clips of three colours."""
    write_demo(home)
    listed = home / "dataset" / "data.json"
    listed.write_text(json.dumps([row for row in json.loads(listed.read_text()) if NEW not in row["cap"]]))
    extract(home)


def all_in_the_new_colour(home: Path) -> None:
    """The embedded default with all sixteen captions, each with a clip of the new colour's shape in its direction."""
    write_demo(home)
    for row in json.loads((home / "dataset" / "data.json").read_text()):
        video = home / "dataset" / row["path"]
        video.unlink()
        write_video(video, DemoClip(NEW, read_caption(row["cap"]).direction).draw(), FPS)
    extract(home)


def convert(mode: str, source: Path, target: Path, *more: str) -> Path:
    convert_command.main(["--mode", mode, "--source_path", str(source), "--target_path", str(target), *more])
    return target


def colours_of(home: Path, weights: Path, videos: Path, seed: int) -> list[str | None]:
    """What the clips of the sixteen prompts show."""
    generate_command.main(
        ["--mm-model", str(home / "configs" / "inference_model.json"), "--load", str(weights),
         "--save-path", str(videos), "--micro-batch-size", "16", "--seed", str(seed)]
    )  # fmt: skip
    _, _, rows = score(videos, read_prompts(home / "prompts.txt"))
    return [row.seen.colour for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The embedded default of three colours, and the model that was trained on it."""
    folder = tmp_path_factory.mktemp("base")
    without_the_new_colour(folder / "demo")
    run(folder / "demo", folder / "run", **PRETRAINING)
    return folder / "demo", convert("convert_to_hf", folder / "run", folder / "hf")


@pytest.mark.nightly
@pytest.mark.parametrize("base_dtype", [None, "int8"])
def test_a_new_colour(base: tuple[Path, Path], tmp_path: Path, base_dtype: str | None) -> None:
    home, weights = base
    all_in_the_new_colour(tmp_path / "demo")
    started = time.monotonic()
    settings: dict[str, Any] = {**TUNING, "load": None, "load_base_model": weights, "lora_base_dtype": base_dtype}
    run(tmp_path / "demo", tmp_path / "run", **settings)
    seconds = time.monotonic() - started
    merged = convert("merge_lora", tmp_path / "run", tmp_path / "hf", "--base_path", str(weights))
    for seed in (0, 1):
        without = colours_of(home, weights, tmp_path / f"without-{seed}", seed)
        with_it = colours_of(home, merged, tmp_path / f"with-{seed}", seed)
        print(f"seed {seed}: {without.count(NEW)} without, {with_it.count(NEW)} with, {seconds:.0f} s")
        assert without.count(NEW) <= 2, without
        assert with_it.count(NEW) >= 14, with_it
