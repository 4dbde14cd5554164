"""The example scripts, run as a user runs them."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from example_runs import bash, finetune_on_two_processes, pretrain_on_two_processes
from script_words import words_of

from mm.config.base import load
from mm.config.flags import as_words, parse_flags
from mm.config.model import WAN_FLF2V_14B, WAN_I2V_1_3B, WAN_I2V_14B
from mm.config.rules.extraction import check_extraction
from mm.dialects.mindspeed.extraction import read_extraction
from mm.dialects.mindspeed.files import load_train_data
from mm.dialects.mindspeed.generate_flags import GenerateFlags
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.train_flags import TrainFlags

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "wan2.1"
RELEASED = {
    "v2v": "wan2.1-t2v-{}",
    "fun_inp": "wan2.1-fun-v1.1-{}-inp",
    "control": "wan2.1-fun-{}-control",
    "control_ref": "wan2.1-fun-v1.1-{}-control",
    "camera": "wan2.1-fun-v1.1-{}-control-camera",
    "speedcontrol": "speedcontrol-{}.safetensors",
}
"""Weights that are not named after the folder of the scripts."""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All stages, with an eighth of the steps: what is generated is not judged."""
    workspace = tmp_path_factory.mktemp("quickstart")
    output = bash(EXAMPLES / "quickstart.sh", timeout_s=300, WORKSPACE=str(workspace), STEPS="150", AT_LEAST="0")
    return workspace, output


@pytest.fixture(scope="module")
def whole_quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """As a user runs it."""
    workspace = tmp_path_factory.mktemp("quickstart")
    return workspace, bash(EXAMPLES / "quickstart.sh", timeout_s=600, WORKSPACE=str(workspace))


@pytest.mark.nightly
def test_quickstart_generates_what_the_captions_ask_for(whole_quickstart: tuple[Path, str]) -> None:
    counts = re.search(r"colour (\d+) of 16, direction (\d+) of 16", whole_quickstart[1])
    assert counts is not None
    assert int(counts[1]) >= 14
    assert int(counts[2]) >= 14


def test_quickstart_learns_and_says_where_everything_is(quickstart: tuple[Path, str]) -> None:
    workspace, output = quickstart
    rows = [json.loads(line) for line in (workspace / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["loss"] for row in rows[-20:]) < 0.5 * sum(row["loss"] for row in rows[:20])
    assert re.search(r"colour \d+ of 16, direction \d+ of 16", output)
    for picture in ("training.png", "videos.png"):
        assert (workspace / picture).read_bytes().startswith(b"\x89PNG")
    for said in ("videos", "training.png", "checkpoints", "trained_hf"):
        assert f"{workspace}/{said}" in output


@pytest.mark.nightly
@pytest.mark.parametrize("seed", ["1", "2"])
def test_quickstart_with_other_seeds(tmp_path: Path, seed: str) -> None:
    output = bash(EXAMPLES / "quickstart.sh", timeout_s=580, WORKSPACE=str(tmp_path / "workspace"), SEED=seed)
    counts = re.search(r"colour (\d+) of 16, direction (\d+) of 16", output)
    assert counts is not None
    assert min(int(counts[1]), int(counts[2])) >= 14


def test_quickstart_resumed_once_without_a_seam(quickstart: tuple[Path, str]) -> None:
    workspace, output = quickstart
    rows = [json.loads(line) for line in (workspace / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert "going on from" in output
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["consumed_samples"] for row in rows] == [16 * row["step"] for row in rows]


def test_quickstart_result_loads_in_diffusers(quickstart: tuple[Path, str]) -> None:
    _, info = WanTransformer3DModel.from_pretrained(quickstart[0] / "trained_hf", output_loading_info=True)
    assert info["missing_keys"] == [] and info["unexpected_keys"] == []


@pytest.mark.nightly
def test_diffusers_generates_what_a_caption_asks_for(whole_quickstart: tuple[Path, str]) -> None:
    workspace, _ = whole_quickstart
    trained = WanTransformer3DModel.from_pretrained(workspace / "trained_hf")
    folder = workspace / "demo" / "weights" / "Wan2.1-T2V-Tiny-Diffusers"
    pipeline = WanPipeline.from_pretrained(folder, transformer=trained)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        "a red circle moving left", height=64, width=64, num_frames=9, num_inference_steps=10, guidance_scale=1.0,
        max_sequence_length=32, generator=torch.Generator().manual_seed(0), output_type="np",
    ).frames[0]  # fmt: skip
    middle = frames[4, 24:40, 24:40].mean(axis=(0, 1))
    assert middle[0] > middle[1] + 0.2 and middle[0] > middle[2] + 0.2, f"not red: {middle}"


def test_quickstart_refuses_a_folder_in_use(quickstart: tuple[Path, str]) -> None:
    environment = {**os.environ, "WORKSPACE": str(quickstart[0])}
    done = subprocess.run(
        ["bash", EXAMPLES / "quickstart.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert done.stderr.startswith("error ENV-003")


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_pretrain_script_in_tiny_mode_on_two_processes(demo: Path, tmp_path: Path, size: str) -> None:
    files = [demo / "configs" / name for name in ("feature_data.json", "pretrain_model.json")]
    weights = demo / "weights" / "Wan2.1-T2V-Tiny-Diffusers" / "transformer"
    rows = pretrain_on_two_processes(f"wan2.1/{size}/t2v", *files, weights, tmp_path)
    assert [row["consumed_samples"] for row in rows] == [8, 16]


@pytest.mark.parametrize("task", ["i2v", "flf2v"])
def test_shipped_files_of_images_fit_together(task: str) -> None:
    """Released models, the files of extraction and those of training agree on task, size and folders."""
    files = EXAMPLES / "feature_extract" / task
    named = {"mm_data": "data.json", "mm_model": "model_wan.json", "mm_tool": "tools.json"}
    run = read_extraction(as_words({flag: files / name for flag, name in named.items()}))
    check_extraction(run)
    assert run.task.name == task
    trained = EXAMPLES / "14b" / task
    features = load_train_data(trained / "feature_data.json").dataset_param.preprocess_parameters
    clip = run.data.clip
    assert (features.num_frames, features.frame_interval) == (clip.num_frames, clip.frame_interval)
    assert (features.max_height, features.max_width) == (clip.height, clip.width) == (720, 1280)
    assert (trained / "data.txt").read_text().strip() == run.output.path
    predictor = load(PretrainModel, trained / "pretrain_model.json").predictor.wan()
    assert predictor == {"i2v": WAN_I2V_14B, "flf2v": WAN_FLF2V_14B}[task]


def test_shipped_file_of_the_small_image_model() -> None:
    assert load(PretrainModel, EXAMPLES / "1.3b" / "i2v" / "pretrain_model.json").predictor.wan() == WAN_I2V_1_3B


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("script", "cp", "most", "least"),
    [("14b/t2v", 1, 45, 43), ("14b/i2v", 2, 52.5, 50.5), ("14b/flf2v", 2, 52.5, 50.5), ("14b/i2v", 1, 84, 60)],
    ids=["t2v 480p", "i2v 720p", "flf2v 720p", "i2v 720p without CP does not fit"],
)
def test_memory_of_the_shipped_14b_scripts(script: str, cp: int, most: int, least: int) -> None:
    """Full fine-extension on 8 devices of 64 GB: predicted, with some GiB left for what no program can know."""
    output = bash(EXAMPLES / script / "pretrain.sh", "--json-output", timeout_s=300, DRY_RUN="1", CP=str(cp))
    report = json.loads(output)
    assert report["world_size"] == 8
    assert report["tokens"] == (32_760 if script.endswith("t2v") else 75_600)
    assert least * 2**30 < report["peak_bytes"] < most * 2**30


@pytest.mark.nightly
@pytest.mark.parametrize("size", ["1.3b", "14b"])
def test_finetune_lora_script_in_tiny_mode_on_two_processes(demo: Path, tmp_path: Path, size: str) -> None:
    files = [demo / "configs" / name for name in ("feature_data.json", "pretrain_model.json")]
    weights = demo / "weights" / "Wan2.1-T2V-Tiny-Diffusers" / "transformer"
    folder = finetune_on_two_processes(f"wan2.1/{size}/t2v", *files, weights, tmp_path)
    transformer = WanTransformer3DModel.from_pretrained(weights)
    WanPipeline(None, None, None, UniPCMultistepScheduler(), transformer).load_lora_weights(folder)
    adapted = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if "lora_A" in name}
    assert len(adapted) == 8 * len(transformer.blocks)  # four projections of both attentions


def test_a_script_leaves_with_the_commands_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", EXAMPLES / "1.3b" / "t2v" / "pretrain.sh", "--train-itres", "5"],
        env={**os.environ, "NPUS_PER_NODE": "1", "SAVE_PATH": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert "CFG-007" in done.stdout


def test_a_precision_that_does_not_exist_is_not_fp32(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", EXAMPLES / "14b" / "t2v" / "pretrain.sh"],
        env={**os.environ, "PRECISION": "bf17", "SAVE_PATH": str(tmp_path / "run")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[:13]) == (64, "error ENV-004")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*/*/*.sh")), ids=lambda p: str(p.relative_to(EXAMPLES)))
def test_scripts_give_flags_that_their_command_takes(tmp_path: Path, script: Path) -> None:
    """What reaches the program, by a `python` that writes its words down; the command's own flags read them."""
    isolated, module, words = words_of(
        script, tmp_path, "--seed", "5", SAVE_PATH=str(tmp_path / "an out"), NPUS_PER_NODE="1"
    )
    assert isolated.samefile(ROOT / "mm" / "isolated.py")
    size, task, stage = script.relative_to(EXAMPLES).with_suffix("").parts
    assert module == ("mm.cli.generate" if stage == "inference" else "mm.cli.train")
    flags = parse_flags(GenerateFlags if stage == "inference" else TrainFlags, words, program=module)
    assert Path(flags.mm_model).samefile(
        script.with_name(f"{'inference' if stage == 'inference' else 'pretrain'}_model.json")
    )
    assert flags.seed == 5
    if isinstance(flags, TrainFlags):
        assert flags.save == str(tmp_path / "an out")
        assert flags.lora == (stage == "finetune_lora")
        assert flags.layerzero == (size == "14b" and not flags.lora)
    loaded = flags.load_base_model if isinstance(flags, TrainFlags) and flags.lora else flags.load
    released = RELEASED.get(task, f"wan2.1-{task}-{{}}").format(size)
    assert loaded is not None and f"{released}/" in re.sub("-720p|-diffusers", "", f"{loaded.lower()}/")


@pytest.mark.parametrize(
    "script", sorted(EXAMPLES.parent.rglob("*.sh")), ids=lambda p: str(p.relative_to(EXAMPLES.parent))
)
def test_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


def test_scripts_set_what_devices_need_and_hear_the_user() -> None:
    """CUDA_DEVICE_MAX_CONNECTIONS=1 would put collectives and kernels into one queue, and nothing here needs it."""

    def found(**variables: str) -> list[str]:
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
        script = f'. "{EXAMPLES}/common.sh"; echo ' + " ".join(f'"${{{name}:-unset}}"' for name in names)
        clean = {name: value for name, value in os.environ.items() if name not in (*names, "PYTORCH_CUDA_ALLOC_CONF")}
        done = subprocess.run(["bash", "-c", script], env=clean | variables, capture_output=True, text=True, check=True)
        return done.stdout.split()

    grows = "expandable_segments:True"
    assert found() == [grows, grows, "unset"]
    assert found(CUDA_DEVICE_MAX_CONNECTIONS="8", PYTORCH_ALLOC_CONF="x:1") == ["x:1", grows, "8"]
    assert found(PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:64")[0] == "max_split_size_mb:64"
