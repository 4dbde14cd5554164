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
from limited_run import limited
from programs import Forked, command
from ranks import free_port
from translated import translated

from mm.cli import train as train_command
from mm.config.base import parse
from mm.config.flags import as_words, parse_flags
from mm.config.rules.training import check_training
from mm.config.run.training import TrainingRun
from mm.data.features import (
    EMPTY_PROMPT,
    EMPTY_PROMPT_ID,
    FEATURES,
    Feature,
    Origin,
    feature_name,
    text_hash,
    write_feature,
)
from mm.data.listing import FeatureRow, write_listing
from mm.data.recipe import Recipe, save_recipe
from mm.device.backend import Backend, select
from mm.device.out_of_memory import bytes_asked_for, is_out_of_memory
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.train_flags import TrainFlags
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


def train(flags: dict[str, Any], folder: Path, megabytes: int | None = None) -> tuple[int, str]:
    """`mm train` in a process of its own; with a limit, in one that may take that much for the model and the step.

    Returns:
        The exit code and everything printed.
    """
    words = as_words(flags)
    if megabytes is None:
        process = command(train_command.main, words, folder)
    else:
        process = Forked(limited, megabytes, "0", words, folder=folder)
    return process.wait(), process.said("stdout") + process.said("stderr")


def train_two(flags: dict[str, Any], megabytes: int) -> tuple[int, str]:
    """The same on two processes, of which the second has the limit."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, str(LIMITED), str(megabytes), "1", *as_words(flags)],
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
    """GiB by kind, which add up to what is told as held."""
    found = re.search(r"It held ([\d.]+) GiB: ([^:]+?)\. (?:Moments|Fix)", line)
    assert found is not None, line
    kinds = {kind: float(size) for kind, size in (part.rsplit(" ", 1) for part in found[2].split(", "))}
    assert sum(kinds.values()) == pytest.approx(float(found[1]), abs=1e-9)
    return kinds


def proposals(line: str) -> list[str]:
    """The three, best first."""
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
    code, output = train(flags, tmp_path, 200)
    assert code == 71, output
    line = error_line(output)
    assert line.startswith("error MEM-001: Rank 0 ran out of memory in the phase: forward and backward; an allocation ")
    assert f"of {WIDE_TENSOR / 2**30:.3f} GiB at mm/wan/" in line
    kinds = told_split(line)
    assert kinds["parameters"] == pytest.approx(WIDE_PARAMETERS / 2**30, rel=0.05)  # and what is not feed-forward
    assert kinds["gradients"] == pytest.approx(kinds["parameters"], abs=0.002)
    to_come = re.search(r" Moments of ([\d.]+) GiB are still to come\.", line)
    assert to_come is not None and float(to_come[1]) == pytest.approx(2 * kinds["parameters"], abs=0.002)
    assert proposals(line) == [
        "--micro-batch-size 1 --global-batch-size 4",
        "--recompute-granularity selective",
        "--bf16",
    ]
    code, output = train(flags, tmp_path)
    assert code == 0, output
    assert "done: step 1" in output


DEEP = {"ffn_dim": 131072}
DEEP_PARAMETERS = 2 * (2 * 64 * 131072) * 4
"""With 2 tokens a sample the model outweighs its activations a hundred times."""
NEEDS_A_MODEL_OF_HALF = "--tensor-model-parallel-size 2 --sequence-parallel on 2 processes instead of 1"


@pytest.mark.parametrize(
    ("megabytes", "phase", "kind"),
    [
        (19 * DEEP_PARAMETERS // 10**7, "building the model", "the unfinished model"),
        (3 * DEEP_PARAMETERS // 10**6, "the optimizer's update", "optimizer state"),
    ],
)
def test_a_model_that_does_not_fit(tmp_path: Path, megabytes: int, phase: str, kind: str) -> None:
    """Parameters, gradients and moments are 1, 1 and 2 times the parameters."""
    code, output = train(write_files(tmp_path, 16, **DEEP), tmp_path, megabytes)
    assert code == 71, output
    line = error_line(output)
    assert f" in the phase: {phase}; an allocation of " in line
    assert told_split(line)[kind] > DEEP_PARAMETERS / 2 / 2**30
    assert NEEDS_A_MODEL_OF_HALF in proposals(line)


@pytest.mark.nightly
def test_checkpoints_stay_and_the_run_goes_on(tmp_path: Path) -> None:
    save = tmp_path / "run"
    flags = write_files(tmp_path, 256, **WIDE) | {"micro_batch_size": 4, "save": save}
    code, output = train({**flags, "micro_batch_size": 1, "global_batch_size": 4}, tmp_path)
    assert code == 0, output
    before = {path: path.read_bytes() for path in sorted(save.rglob("iter_*/*"))}
    assert before
    code, output = train({**flags, "train_iters": 2}, tmp_path, WIDE_TENSOR // 10**6 + 4 * WIDE_PARAMETERS // 10**6)
    assert (code, "forward and backward" in error_line(output)) == (71, True), output
    assert {path: path.read_bytes() for path in sorted(save.rglob("iter_*/*"))} == before
    code, output = train({**flags, "train_iters": 2}, tmp_path)
    assert code == 0, output
    assert "going on from" in output and "done: step 2" in output


@pytest.mark.parametrize(
    "layout",
    [{"context_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
)
@pytest.mark.nightly
def test_the_other_rank_does_not_wait(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Rank 1 of 2 fails and tells it, before the launcher ends the job for whoever it sees end first."""
    flags = write_files(tmp_path, 256, **WIDE) | {"micro_batch_size": 2, "global_batch_size": 4} | layout
    code, output = train_two(flags, 200)
    assert code != 0
    (line,) = [line for line in output.splitlines() if "error MEM-001" in line]
    assert "Rank 1 ran out of memory in the phase: forward and backward" in line


@pytest.mark.nightly
def test_two_processes_without_a_launcher_end(tmp_path: Path) -> None:
    """Nobody ends rank 0, which waits for rank 1's gradients: it must see that the other one has gone."""
    flags = write_files(tmp_path, 256, **WIDE) | {"micro_batch_size": 2}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(LIMITED), "200", "1", *as_words(flags)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        printed = [process.communicate(timeout=60)[0] for process in processes]
    assert processes[1].returncode == 71, printed[1]
    assert "error MEM-001: Rank 1 ran out of memory" in printed[1]
    assert processes[0].returncode != 0, printed[0]


def impossible_allocation(device: Backend) -> None:
    torch.empty(2**57, dtype=torch.uint8, device=device.device)


def impossible_object(device: Backend) -> None:
    bytearray(2**62)


def wrong_shapes(device: Backend) -> None:
    torch.ones(2, 3, device=device.device) @ torch.ones(2, 3, device=device.device)


def a_run() -> TrainingRun:
    words = "--mm-data d --mm-model m --lr 1 --train-iters 1 --init-from-scratch"
    shape = {"hidden_size": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2}
    model = parse(PretrainModel, {"predictor": shape, "diffusion": {}}, "m")
    run = translated(parse_flags(TrainFlags, words.split(), program="mm train"), model)
    check_training(run)
    return run


@pytest.mark.parametrize(
    ("fails", "size"), [(impossible_allocation, f"of {2**57 / 2**30:.3f} GiB"), (impossible_object, "of unknown size")]
)
def test_what_torch_and_python_raise_is_understood(fails: Any, size: str) -> None:
    backend = select("cpu")
    with (
        pytest.raises(OutOfMemoryError, match="MEM-001") as caught,
        MemoryWatch(a_run(), backend, rank=3).during("building the model"),
    ):
        fails(backend)
    assert f"Rank 3 ran out of memory in the phase: building the model; an allocation {size} " in str(caught.value)
    assert isinstance(caught.value.__cause__, (RuntimeError, MemoryError))
    assert len(proposals(str(caught.value))) == 3


def test_other_errors_pass_unchanged() -> None:
    backend = select("cpu")
    with pytest.raises(RuntimeError) as raw:
        wrong_shapes(backend)
    with (
        pytest.raises(RuntimeError) as caught,
        MemoryWatch(a_run(), backend, rank=0).during("forward and backward"),
    ):
        wrong_shapes(backend)
    assert (type(caught.value), str(caught.value)) == (type(raw.value), str(raw.value))
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    inner = RuntimeError("out of memory, says somebody else's library on a CPU run")
    with (
        pytest.raises(RuntimeError) as caught,
        MemoryWatch(a_run(), backend, rank=0).during("forward and backward"),
    ):
        raise inner
    assert caught.value is inner


@pytest.mark.parametrize(
    ("error", "size"),
    [
        # as PyTorch's CUDACachingAllocator.cpp and torch_npu's NPUCachingAllocator.cpp write them
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total "), 20.5 * 2**30),
        (torch.OutOfMemoryError("NPU out of memory. Tried to allocate 674.00 MiB (NPU 0; 60.96 GiB "), 674 * 2**20),
        (RuntimeError("NPU out of memory. Tried to allocate 512 bytes (NPU 0; 28.50 GiB total capacity; "), 512),
        (RuntimeError("CUDA error: out of memory"), None),
    ],
)
def test_messages_of_accelerators(error: RuntimeError, size: float | None) -> None:
    assert is_out_of_memory(error, on_host=False)
    assert not is_out_of_memory(error, on_host=True)
    assert bytes_asked_for(error) == size


def test_a_host_without_memory_is_not_the_accelerators_matter() -> None:
    assert not is_out_of_memory(MemoryError(), on_host=False)
