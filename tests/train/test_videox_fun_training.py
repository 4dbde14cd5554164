"""VideoX-Fun's scripts on tiny models: features, steps, ZeRO, what is written, and going on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import metrics
from videox_fun_files import DATA, home, write_metadata

from mm.checkpoint.files import temporary_name
from mm.cli import videox_fun
from mm.errors import ConfigError
from mm.lora.files import read_adapter
from mm.wan.folder import WeightFolder

MODELS = "models/Diffusion_Transformer"
TASKS = {"fun_control_ref": "V1.1", "fun_control": "V1.0", "fun_inp": "InP", "t2v": "T2V", "fun_camera": "Camera"}
REFERENCE = "--train_mode=control_ref --control_ref_image=random --add_full_ref_image_in_self_attention"
SCRIPTS = {
    "wan2.1_fun/train_control.py": ("fun_control_ref", f"{REFERENCE} --trainable_modules ."),
    "wan2.1_fun/train_control_lora.py": ("fun_control", "--train_mode=control_ref --rank=4 --network_alpha=2"),
    "wan2.1_fun/train.py": ("fun_inp", "--train_mode=inpaint --trainable_modules . --image_sample_size=64"),
    "wan2.1/train.py": ("t2v", "--train_mode=normal --trainable_modules ."),
}
ZERO = {
    stage: {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": f"config/zero_stage{stage}_config.json",
    }
    for stage in (2, 3)
}


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = home(demo, tmp_path_factory.mktemp("videox"), {f"{MODELS}/{name}": task for task, name in TASKS.items()})
    write_metadata(demo, place / DATA / "metadata.json", num_rows=4)
    return place


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def words(script: str, out: Path | str, more: str = "") -> list[str]:
    """The guide's command for the embedded default: its flags, with sizes of tiny clips."""
    task, own = SCRIPTS[script]
    return (
        f"{script} --config_path=config/wan2.1/wan_civitai.yaml "
        f"--pretrained_model_name_or_path={MODELS}/{TASKS[task]} --train_data_dir={DATA}/ "
        f"--train_data_meta={DATA}/metadata.json --image_sample_size=96 --video_sample_size=32 --token_sample_size=64 "
        "--video_sample_stride=1 --video_sample_n_frames=9 --train_batch_size=1 --video_repeat=1 "
        "--dataloader_num_workers=0 --max_train_steps=2 --checkpointing_steps=1 --learning_rate=1e-3 "
        f"--lr_scheduler=constant_with_warmup --lr_warmup_steps=1 --seed=42 --output_dir={out} "
        "--gradient_checkpointing --adam_weight_decay=3e-2 --adam_epsilon=1e-10 --vae_mini_batch=1 "
        "--max_grad_norm=0.05 --random_hw_adapt --training_with_video_token_length --enable_bucket "
        f"--uniform_sampling --low_vram --feature_draws=1 {own} {more}"
    ).split()


def on_a_rank(folder: Path, variables: dict[str, str], commands: list[list[str]]) -> None:
    os.chdir(folder)
    os.environ.update(variables)
    for command in commands:
        videox_fun.main(command)


def same_losses(found: Path, expected: Path) -> None:
    ours, theirs = metrics(found), metrics(expected)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == [1, 2]
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-6)


def zero_equals_one_process(folder: Path, tmp_path: Path, script: str, stages: tuple[int, ...]) -> None:
    single = tmp_path / "single"
    videox_fun.main(words(script, single, "--gradient_accumulation_steps=2"))
    for stage in stages:
        place = tmp_path / f"zero{stage}"
        shutil.copytree(single / "features", place / "features")  # which are taken as they are
        command = words(script, place, "--use_deepspeed")
        run_ranks(2, on_a_rank, folder, ZERO[stage], [command], timeout_s=300)
        same_losses(place, single)


def test_zero_3_gives_the_losses_of_one_process_and_writes_what_users_look_for(folder: Path, tmp_path: Path) -> None:
    script = "wan2.1_fun/train_control.py"
    zero_equals_one_process(folder, tmp_path, script, (3,))
    written, started = tmp_path / "zero3" / "checkpoint-2" / "transformer", folder / MODELS / TASKS["fun_control_ref"]
    assert json.loads((written / "config.json").read_text()).keys() >= {"dim", "in_dim", "num_layers", "add_ref_conv"}
    weights, before = (load_file(place / "diffusion_pytorch_model.safetensors") for place in (written, started))
    assert {name: value.shape for name, value in weights.items()} == {name: v.shape for name, v in before.items()}
    assert not torch.equal(weights["ref_conv.weight"], before["ref_conv.weight"])
    single = load_file(tmp_path / "single" / "checkpoint-2" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(value, single[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="CFG-349"):
        videox_fun.main(words(script, tmp_path / "single"))


@pytest.mark.nightly
@pytest.mark.parametrize("script", SCRIPTS)
def test_zero_gives_the_losses_of_one_process(folder: Path, tmp_path: Path, script: str) -> None:
    zero_equals_one_process(folder, tmp_path, script, (2, 3))


@pytest.mark.nightly
def test_adapters_are_a_file_with_alpha(folder: Path, tmp_path: Path) -> None:
    script = "wan2.1_fun/train_control_lora.py"
    videox_fun.main(words(script, tmp_path, "--checkpoints_total_limit=1"))
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2.safetensors"}
    tensors = load_file(tmp_path / "checkpoint-2.safetensors")
    name = "lora_unet__blocks_0_self_attn_q"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 128)
    assert tensors[f"{name}.lora_up.weight"].abs().sum() > 0
    assert float(tensors[f"{name}.alpha"]) == 2.0
    adapter = read_adapter(tmp_path / "checkpoint-2.safetensors")
    assert len(adapter.updates) * 3 == len(tensors)


@pytest.mark.nightly
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(folder: Path, tmp_path: Path) -> None:
    script = "wan2.1/train.py"
    videox_fun.main(words(script, tmp_path / "whole"))
    half = words(script, tmp_path / "two", "--max_train_steps=1")
    shutil.copytree(tmp_path / "whole" / "features", tmp_path / "two" / "features")
    videox_fun.main(half)
    videox_fun.main(words(script, tmp_path / "two", "--resume_from_checkpoint=latest"))
    assert [row["loss_hex"] for row in metrics(tmp_path / "two")] == [
        row["loss_hex"] for row in metrics(tmp_path / "whole")
    ]
    for name in ("checkpoint-1", "checkpoint-2"):
        assert WeightFolder.open(tmp_path / "two" / name / "transformer").config().num_layers == 4


@pytest.mark.parametrize("script", ["wan2.1/train.py", "wan2.1_fun/train_control_lora.py"])
def test_what_a_kill_after_a_checkpoint_leaves_out_is_written_when_the_run_goes_on(
    folder: Path, tmp_path: Path, script: str
) -> None:
    """Half of the folder, as a kill in the middle leaves it; of the steps nothing is left to do."""
    videox_fun.main(words(script, tmp_path, "--max_train_steps=1"))
    [written] = tmp_path.glob("checkpoint-1*")
    file = written if written.is_file() else written / "transformer" / "diffusion_pytorch_model.safetensors"
    expected = file.read_bytes()
    if written.is_dir():
        (written / "transformer").rename(written / ".tmp-transformer")
    else:
        written.rename(written.with_name(temporary_name(written.name)))
    videox_fun.main(words(script, tmp_path, "--max_train_steps=1 --resume_from_checkpoint=latest"))
    assert file.read_bytes() == expected
    assert not list(tmp_path.glob(".tmp-*")) and not list(tmp_path.rglob(".tmp-transformer"))


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, **variables}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.nightly
def test_the_guide_s_lines_run_under_a_shell(folder: Path, tmp_path: Path) -> None:
    """By our own `accelerate`, which takes ZeRO-3's line with its typing mistake, with the machines' variables."""
    zero = (
        "--zero_stage 3 --zero3_save_16bit_model true --zero3_init_flag true --use_deepspeed "
        "--deepspeed_config_file config/zero_stage3_config.json --deepspeed_multinode_launcherr standard"
    )
    command = words("wan2.1_fun/train_control.py", tmp_path, "--use_deepspeed")
    line = f"accelerate launch {zero} --num_processes=2 scripts/{' '.join(command)}"
    exported = "export MASTER_ADDR=localhost MASTER_PORT=10086 WORLD_SIZE=1 RANK=0 NCCL_IB_DISABLE=1\nNCCL_DEBUG=INFO\n"
    path = f"{folder / 'scripts' / 'launcher'}:{os.environ['PATH']}"
    done = shell(exported + line, folder, PATH=path)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoint-2" / "transformer" / "config.json").is_file()


@pytest.mark.nightly
def test_accelerate_itself_starts_a_script(folder: Path, tmp_path: Path) -> None:
    accelerate = Path(sys.executable).with_name("accelerate")
    if not accelerate.exists():
        pytest.skip("accelerate is not installed")
    command = words("wan2.1/train.py", tmp_path)
    done = shell(f'{accelerate} launch --mixed_precision="bf16" scripts/{" ".join(command)}', folder)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


@pytest.mark.nightly
def test_zero_to_bf16_takes_the_run_s_checkpoint(folder: Path, tmp_path: Path) -> None:
    """As the guide has it, of `output_dir/checkpoint-N`."""
    videox_fun.main(words("wan2.1/train.py", tmp_path / "run"))
    line = f"python scripts/zero_to_bf16.py {tmp_path}/run/checkpoint-2 {tmp_path}/out --max_shard_size 80GB "
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = shell(f"{line} --safe_serialization", folder, PATH=path)
    assert done.returncode == 0, done.stderr
    weights: dict[str, Any] = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
