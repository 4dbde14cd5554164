"""A training process whose memory is limited so that a real allocation fails: one error with all that it should say.

Shapes are such that one tensor is larger than the room that is left: activations of a wide feed-forward, or moments.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import free_port

from mm.config.base import parse
from mm.config.flags import as_words, parse_flags
from mm.config.request import Request
from mm.config.rules import check_training
from mm.config.train import PretrainModel, TrainFlags
from mm.data.features import (
    EMPTY_PROMPT,
    EMPTY_PROMPT_ID,
    FEATURES,
    Feature,
    FeatureRow,
    Origin,
    feature_name,
    text_hash,
    write_feature,
    write_listing,
)
from mm.data.recipe import Recipe, save_recipe
from mm.device.backend import Backend, select
from mm.device.out_of_memory import bytes_asked_for, is_out_of_memory
from mm.errors import OutOfMemoryError
from mm.train.out_of_memory import MemoryWatch

ROOT = Path(__file__).parents[2]
LIMITED = Path(__file__).with_name("limited_run.py")
TEXT_DIM = 8


def write_files(home: Path, side: int, **predictor: Any) -> dict[str, Any]:
    """Features of four samples of 2 latent frames, `side` pixels wide and high, and the flags of a run on them."""
    recipe = Recipe(
        vae="v", text_encoder="t", tokenizer="k", height=side, width=side, num_frames=5, min_num_frames=None,
        frame_interval=1, vae_dtype="fp32", text_dtype="fp32", tile_size=None, tile_stride=(18, 16),
        max_text_tokens=512, seed=1,
    )  # fmt: skip
    (home / "features" / FEATURES).mkdir(parents=True)
    save_recipe(home / "features", recipe)
    random, rows = torch.Generator().manual_seed(0), []
    for sample in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        latents = torch.randn(16, 2, side // 8, side // 8, generator=random)
        prompt, origin = torch.randn(3, TEXT_DIM, generator=random), Origin(sample, recipe.key, text_hash("x"), "v")
        write_feature(home / "features" / FEATURES / feature_name(sample), Feature(latents, prompt), origin, 512)
        rows.append(
            FeatureRow(
                sample=sample, file=f"{FEATURES}/{feature_name(sample)}", path=sample, cap="x", start_frame_idx=0,
                sample_num_frames=5, sample_size=f"5x{side}x{side}", latent_shape=(16, 2, side // 8, side // 8),
                text_tokens=3,
            )
        )  # fmt: skip
    empty = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    write_feature(home / "features" / FEATURES / EMPTY_PROMPT, Feature(None, torch.zeros(1, TEXT_DIM)), empty, 512)
    write_listing(home / "features", rows)
    clip = {"num_frames": 5, "max_height": side, "max_width": side}
    source = {"data_path": str(home / "features" / "data.jsonl"), "data_folder": str(home / "features")}
    data = {"dataset_type": "t2v", "basic_parameters": source, "preprocess_parameters": clip}
    shape = {"hidden_size": 64, "ffn_dim": 256, "num_heads": 2, "num_layers": 2, "text_dim": TEXT_DIM, "text_len": 8}
    data_file, model_file = home / "feature_data.json", home / "pretrain_model.json"
    data_file.write_text(json.dumps({"dataset_param": data}))
    model_file.write_text(json.dumps({"predictor": {**shape, **predictor}, "diffusion": {}}))
    return {
        "mm_data": data_file, "mm_model": model_file, "init_from_scratch": True, "lr": 1e-3, "train_iters": 1,
        "num_workers": 0, "no_progress_bar": True, "device": "cpu",
    }  # fmt: skip


def train(flags: dict[str, Any], megabytes: int | None = None, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    """`mm train` on its own; with a limit, in a process that may take that much for the model and the step.

    Returns:
        The exit code and everything printed.
    """
    command = ["-m", "mm.cli.train"] if megabytes is None else [str(LIMITED), str(megabytes), "1" if launcher else "0"]
    done = subprocess.run(
        [sys.executable, *launcher, *command, *as_words(flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def error_line(output: str) -> str:
    """The one error, which is one line."""
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error ")]
    return line


def told_split(line: str) -> dict[str, float]:
    """GB by kind, which add up to what is told as held."""
    found = re.search(r"It held ([\d.]+) GB: ([^:]+?)\. (?:The first update|Fix)", line)
    assert found is not None, line
    kinds = {kind: float(size) for kind, size in (part.rsplit(" ", 1) for part in found[2].split(", "))}
    assert sum(kinds.values()) == pytest.approx(float(found[1]), abs=1e-9)
    return kinds


def proposals(line: str) -> list[str]:
    """The three, the first given in backquotes or not."""
    found = re.search(r"best first: \(1\) (.+); \(2\) (.+); \(3\) (.+)\.$", line)
    assert found is not None, line
    return list(found.groups())


WIDE = {"ffn_dim": 32768}
WIDE_TENSOR = 4 * 512 * 32768 * 4
"""Bytes of 4 samples of 512 tokens inside the feed-forward, fp32; two thousand times what is outside of it."""
WIDE_PARAMETERS = 2 * (2 * 64 * 32768) * 4
"""Bytes of the feed-forwards of 2 blocks."""


def test_a_step_that_does_not_fit(tmp_path: Path) -> None:
    flags = write_files(tmp_path, 256, **WIDE) | {"micro_batch_size": 4}
    code, output = train(flags, megabytes=200)
    assert code == 71, output
    line = error_line(output)
    assert line.startswith("error MEM-001: Rank 0 ran out of memory in the phase: forward and backward; an allocation ")
    assert f"of {WIDE_TENSOR / 1e9:.3f} GB at mm/wan/" in line
    kinds = told_split(line)
    assert kinds["parameters"] == pytest.approx(WIDE_PARAMETERS / 1e9, rel=0.05)  # and what is not feed-forward
    assert kinds["gradients"] == pytest.approx(kinds["parameters"], abs=0.002)
    assert f"The first update adds {2 * WIDE_PARAMETERS / 1e9:.2f}"[:-1] in line
    assert proposals(line) == [
        "--micro-batch-size 1 --global-batch-size 4",
        "--bf16",
        "--recompute-granularity full --recompute-method uniform",
    ]
    code, output = train(flags)
    assert code == 0, output
    assert "done: step 1" in output
