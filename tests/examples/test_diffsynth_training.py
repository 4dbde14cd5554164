"""DiffSynth-Studio's train.py on tiny models in the released files' names, as its users start it."""

import csv
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ANY_PORT
from released import COMMON, TRANSFORMER, released_config, write_common_files, write_release
from safetensors.torch import load_file, save_file

from mm import ModelConfig, WanVideoPipeline
from mm.checkpoint.files import temporary_name
from mm.checkpoint.weights import open_weights
from mm.cli import diffsynth_train, translate
from mm.cli.diffsynth_models import join_models
from mm.config.run.extraction import ExtractionRun
from mm.config.run.file import load_run
from mm.config.run.training import TrainingRun
from mm.demo.video import write_video
from mm.dialects.diffsynth.named_models import NamedModel
from mm.errors import ConfigError, MMError
from mm.lora.files import read_adapter
from mm.wan.model import whole_shapes
from mm.wan.precision import keep_fp32

TRAIN = Path(__file__).parents[2] / "examples" / "wanvideo" / "model_training" / "train.py"
CONTROL = "PAI/Wan2.1-Fun-1.3B-Control"
PATTERNS = ("diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
SIZE = ("--height", "32", "--width", "48", "--num_frames", "5")
LORA = ("--lora_base_model", "dit", "--lora_rank", "4", "--lora_target_modules", "q,k,v,o,ffn.0,ffn.2")


def released(model_id: str, *more: str) -> str:
    """The guide's way to name models."""
    return ",".join(f"{model_id}:{pattern}" for pattern in (*PATTERNS, *more))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to start commands in, with `models` and a data set of two videos."""
    folder = tmp_path_factory.mktemp("diffsynth")
    write_common_files(folder / "models")
    write_release(folder / "models", COMMON, "t2v")
    write_release(folder / "models", CONTROL, "fun_control", shards=2)
    motion = {
        name.removeprefix("motion_controller."): torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for name, shape in whole_shapes(released_config("speedcontrol")).items()
        if name.startswith("motion_controller.")
    }
    speed = folder / "models" / "DiffSynth-Studio" / "Wan2.1-1.3b-speedcontrol-v1"
    speed.mkdir(parents=True)
    save_file(motion, speed / "model.safetensors")
    (folder / "data").mkdir()
    source = np.random.default_rng(0)
    for name in ("video1.mp4", "video2.mp4", "video1_softedge.mp4", "video2_softedge.mp4"):
        write_video(folder / "data" / name, source.integers(0, 255, (5, 32, 48, 3), dtype=np.uint8), 8)
    with (folder / "data" / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "prompt", "control_video", "motion_bucket_id"])
        rows.writerow(["video1.mp4", "from sunset to night, a small town", "video1_softedge.mp4", 10])
        rows.writerow(["video2.mp4", "a dog is running", "video2_softedge.mp4", 90])
    return folder


def words(output: Path, *more: str, models: str = released(COMMON)) -> list[str]:
    """A command line of the guide's shape."""
    return [
        "--dataset_base_path", "data", "--dataset_metadata_path", "data/metadata.csv", *SIZE,
        "--dataset_repeat", "2", "--model_id_with_origin_paths", models, "--learning_rate", "1e-4",
        "--dataset_num_workers", "0", "--remove_prefix_in_ckpt", "pipe.dit.", "--output_path", str(output), *more,
    ]  # fmt: skip


def test_mm_translate_prints_both_stages(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the processes that accelerate's words start; nothing is done."""
    monkeypatch.chdir(home)
    launch = ["accelerate", "launch", "--num_processes", "2", "--use_deepspeed", "--zero_stage", "2"]
    program = "examples/wanvideo/model_training/train.py"
    translate.main(["--", *launch, program, *words(tmp_path / "out", *LORA, "--num_epochs", "3")])
    runs = []
    for number, text in enumerate(capsys.readouterr().out.split("---\n")):
        (tmp_path / f"{number}.yaml").write_text(text)
        run = load_run(tmp_path / f"{number}.yaml", 2)
        assert not run.problems
        runs.append(run)
    extraction, training = runs
    assert isinstance(extraction, ExtractionRun) and isinstance(training, TrainingRun)
    assert training.training.steps == 3 * 2  # passes over two rows, each twice, on two processes
    assert training.parallel.distributed_optimizer
    assert not (tmp_path / "out").exists()


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "checkpoints" / "metrics.jsonl").read_text().splitlines()]


def test_lora_of_the_released_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file an epoch in its names; at the rate that is asked for from the first step; and nothing is done twice.

    The first step of AdamW moves each number by the learning rate, whatever its gradient is, and weight decay leaves
    a zero alone: so B, which begins as zero, is the rate after one step.
    """
    monkeypatch.chdir(home)
    asked = words(tmp_path / "out", *LORA, "--num_epochs", "2", "--save_steps", "1")
    diffsynth_train.main(asked)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"step-{step}.safetensors" for step in range(1, 9)]
    first = load_file(tmp_path / "out" / "step-1.safetensors")
    linears = [
        f"blocks.{block}.{name}"
        for block in range(2)
        for name in (*(f"{kind}_attn.{one}" for kind in ("self", "cross") for one in "qkvo"), "ffn.0", "ffn.2")
    ]
    halves = ("lora_A", "lora_B")
    assert sorted(first) == sorted(f"{name}.{half}.default.weight" for name in linears for half in halves)
    moved = torch.cat([first[f"{name}.lora_B.default.weight"].abs().flatten() for name in linears]).max()
    torch.testing.assert_close(moved, torch.tensor(1e-4), rtol=1e-3, atol=0)
    adapter = read_adapter(tmp_path / "out" / "step-8.safetensors")
    assert {(update.rank, update.alpha) for update in adapter.updates.values()} == {(4, 4.0)}
    rows = metrics(tmp_path / "out")
    assert [row["lr"] for row in rows] == [1e-4] * 8
    caplog.set_level(logging.INFO)
    caplog.clear()
    (tmp_path / "out" / "step-8.safetensors").rename(tmp_path / "out" / temporary_name("step-8.safetensors"))
    diffsynth_train.main(asked)
    assert "nothing was left to encode" in caplog.text and "already done" in caplog.text
    assert load_file(tmp_path / "out" / "step-8.safetensors").keys() == first.keys()
    assert not list((tmp_path / "out").glob(".tmp-*"))  # of a kill in the middle of writing


SPEED = "DiffSynth-Studio/Wan2.1-1.3b-speedcontrol-v1:model.safetensors"
MOTION = [f"linear.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("bias", "weight")]


def with_speed(output: Path, prefixes: str, *more: str) -> list[str]:
    """A command line for the model with speed control: its controller is trained whole."""
    asked = words(output, *more, "--input_contains_motion_bucket_id", models=f"{released(COMMON)},{SPEED}")
    asked[asked.index("--remove_prefix_in_ckpt") + 1] = prefixes
    return [*asked, "--trainable_models", "motion_controller"]


def test_a_part_beside_a_lora(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file with both, which a pipeline loads; AdamW's first step moves the part by the rate."""
    monkeypatch.chdir(home)
    out = tmp_path / "out"
    diffsynth_train.main(with_speed(out, "pipe.dit.,pipe.motion_controller.", *LORA, "--save_steps", "1"))
    before = load_file(home / "models" / SPEED.replace(":", "/"))
    beside = load_file(out / "checkpoints" / "iter_0000003" / "trained_parts.safetensors")
    assert sorted(beside) == [f"motion_controller.{name}" for name in MOTION]
    file = load_file(out / "step-4.safetensors")
    lora = [name for name in file if ".lora_" in name]
    assert len(lora) == 40 and sorted(file.keys() - set(lora)) == MOTION
    adapter = read_adapter(out / "step-4.safetensors")
    assert len(adapter.updates) == 20 and sorted(adapter.parts) == sorted(beside)
    moved = {name: float((beside[f"motion_controller.{name}"] - before[name]).abs().max()) for name in MOTION}
    assert all(0 < value <= 3 * 1.2e-4 for value in moved.values()), moved
    models = [ModelConfig(path=f"models/{COMMON}/{name}") for name in (TRANSFORMER, *PATTERNS[1:])]
    models.append(ModelConfig(path=f"models/{SPEED.replace(':', '/')}"))
    tokenizer = ModelConfig(path=f"models/{COMMON}/google/umt5-xxl")
    pipe = WanVideoPipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", model_configs=models, tokenizer_config=tokenizer
    )
    weights = {name: value.detach().clone() for name, value in pipe.dit.named_parameters()}
    pipe.load_lora(pipe.dit, out / "step-4.safetensors")
    for name, value in pipe.dit.named_parameters():
        if name in adapter.parts:
            assert torch.equal(value, adapter.parts[name].float()), name
        else:
            assert torch.equal(value, weights[name]) == (name.removesuffix(".weight") not in adapter.updates), name


@pytest.mark.nightly
def test_a_part_alone(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is one as it is released, from which the next training starts."""
    monkeypatch.chdir(home)
    out, checkpoints = tmp_path / "out", tmp_path / "out" / "checkpoints"
    diffsynth_train.main(with_speed(out, "pipe.motion_controller.", "--num_epochs", "2"))
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["epoch-0.safetensors", "epoch-1.safetensors"]
    file, before = load_file(out / "epoch-1.safetensors"), load_file(home / "models" / SPEED.replace(":", "/"))
    assert {name: value.shape for name, value in file.items()} == {name: v.shape for name, v in before.items()}
    source, started = open_weights(checkpoints), load_file(home / "models" / COMMON / TRANSFORMER)
    for name, value in started.items():
        kept = value.float() if keep_fp32(name) else value.bfloat16()
        assert torch.equal(source.read(name), kept), name
    paths = [f"models/{COMMON}/{name}" for name in (TRANSFORMER, *PATTERNS[1:])]
    named = ["--model_paths", json.dumps([*paths, str(out / "epoch-1.safetensors")])]
    named += ["--tokenizer_path", f"models/{COMMON}/google/umt5-xxl", "--trainable_models", "motion_controller"]
    asked = words(tmp_path / "next", "--input_contains_motion_bucket_id")
    at = asked.index("--model_id_with_origin_paths")
    diffsynth_train.main([*asked[:at], *asked[at + 2 :], *named])
    assert len(metrics(tmp_path / "next")) == 4


@pytest.mark.nightly
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("row", ["t2v full", "t2v lora", "control full", "speed lora", "speed both"])
def test_rows_of_the_guide_under_accelerate(home: Path, tmp_path: Path, row: str, world_size: int) -> None:
    """Two epochs of four samples, the same samples and steps' worth of them on one process and two."""
    model, kind = row.split()
    named, more = released(COMMON), ["--lora_base_model", "dit", "--lora_rank", "4"]
    if model == "control":
        named = released(CONTROL, CLIP)
    if model == "speed":
        named += f",{SPEED}"
        more += ["--input_contains_motion_bucket_id"]
    if kind == "full":
        more = ["--trainable_models", "dit"]
    if kind == "both":
        more += ["--trainable_models", "motion_controller"]
    if model == "control":
        more += ["--data_file_keys", "image,video,control_video", "--input_contains_control_video"]
    out = tmp_path / "out"
    launched = [
        *(
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu" if world_size == 1 else "--multi_gpu",
            "--num_machines",
            "1",
            "--mixed_precision",
            "bf16",
        ),
        *("--num_processes", str(world_size), "--dynamo_backend", "no", "--main_process_port", ANY_PORT),
        *(str(TRAIN), *words(out, *more, "--num_epochs", "2", models=named)),
    ]
    done = subprocess.run(
        launched, cwd=home, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["epoch-0.safetensors", "epoch-1.safetensors"]
    rows = metrics(out)
    assert [row["consumed_samples"] for row in rows] == list(range(world_size, 9, world_size))
    assert all(math.isfinite(row["loss"]) for row in rows)
    trained = load_file(out / "epoch-1.safetensors")
    if kind == "full":
        given = {}
        for file in (home / "models" / (CONTROL if model == "control" else COMMON)).glob("*.safetensors"):
            given |= load_file(file)
        assert {name: value.shape for name, value in trained.items()} == {n: v.shape for n, v in given.items()}
        assert {value.dtype for value in trained.values()} == {torch.bfloat16}
        assert not torch.equal(trained["head.head.weight"], given["head.head.weight"].bfloat16())
    else:
        lora = [name for name in trained if name.startswith("blocks.")]
        beside = [f"pipe.motion_controller.{name}" for name in MOTION] if kind == "both" else []
        assert len(lora) == 40 and sorted(trained.keys() - set(lora)) == beside


def test_everything_that_is_wrong_is_told_before_anything_is_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    models = f"Wan-AI/Wan2.1-T2V-1.3C:{PATTERNS[0]},{COMMON}:models_t6*.pth,nothing"
    asked = words(tmp_path / "out", "--learning_rate", "x", "--dataset_metadata_path", "no.csv", models=models)
    with pytest.raises(ConfigError) as raised:
        diffsynth_train.main(asked)
    ids = [problem.id for problem in raised.value.problems]
    assert ids == ["CFG-005", "CFG-381", "DATA-060"]
    asked = words(tmp_path / "out", *LORA, models=models.removesuffix(",nothing"))
    with pytest.raises(ConfigError) as raised:
        diffsynth_train.main(asked)
    told = [str(problem) for problem in raised.value.problems]
    assert [line[:7] for line in told] == ["CFG-402", "CFG-401"]  # the hub is asked, which tests cannot reach
    assert "Wan2.1-T2V-1.3C" in told[0] and "models_t6*.pth" in told[1]
    assert not (tmp_path / "out").exists()


def test_adapters_that_cannot_be_are_told_before_features_are_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    video = f"models/{COMMON}/{PATTERNS[2]}"
    for more, said in (
        (["--lora_target_modules", "foo"], "CFG-100"),
        (["--lora_checkpoint", "gone.safetensors"], "DATA-095"),
        (["--lora_checkpoint", video], "DATA-095"),
    ):
        with pytest.raises(MMError, match=said):
            diffsynth_train.main(words(tmp_path / "out", *LORA, *more))
        assert not (tmp_path / "out").exists()


def test_a_model_in_two_parts_that_was_joined_of_others_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    speed = Path("DiffSynth-Studio") / "Wan2.1-1.3b-speedcontrol-v1" / "model.safetensors"
    copy = tmp_path / "model.safetensors"
    copy.write_bytes((Path("models") / speed).read_bytes())
    common = Path("models") / COMMON
    named = [NamedModel("--model_paths", (str(path),)) for path in (common / TRANSFORMER, copy)]
    named += [NamedModel("--model_paths", (str(common / name),)) for name in PATTERNS[1:]]
    joined = tmp_path / "out" / "model"
    for _ in range(2):
        join_models(named, None, joined)  # the second time it is there
    save_file({name: 2 * value for name, value in load_file(copy).items()}, copy)
    with pytest.raises(ConfigError, match=r"CFG-445.*--model_paths"):
        join_models(named, None, joined)


def test_models_that_do_not_belong_together(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    common, control = Path("models") / COMMON, Path("models") / CONTROL
    shards = sorted(str(path) for path in control.glob("*.safetensors"))

    def ids(*paths: Any) -> list[str]:
        asked = ["--model_paths", json.dumps(paths), "--tokenizer_path", str(common / "google" / "umt5-xxl")]
        with pytest.raises(ConfigError) as raised:
            diffsynth_train.main([*words(tmp_path / "out", *LORA, models="")[:10], *asked, *LORA])
        return [problem.id for problem in raised.value.problems]

    encoders = [str(common / name) for name in PATTERNS[1:]]
    assert ids(str(common / TRANSFORMER), encoders[0]) == ["CFG-404"]  # no VAE
    assert ids(str(common / TRANSFORMER), shards, *encoders) == ["CFG-404"]  # two transformers
    second = shutil.copy(common / TRANSFORMER, tmp_path / "second.safetensors")
    assert ids(str(common / TRANSFORMER), str(second), *encoders) == ["CFG-404"]  # two experts, of which one is trained
    assert ids(shards[:1], *encoders) == ["DATA-024"]
    assert ids("gone.safetensors", *encoders, "gone.pth") == ["CFG-403"] * 2
    assert ids(shards, *encoders) == ["CFG-383"]  # no image encoder
