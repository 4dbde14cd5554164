"""VideoX-Fun's scripts on tiny models: features, steps, ZeRO, what is written, and going on."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import AutoencoderKLWan
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import metrics
from videox_fun_files import DATA, home, write_metadata

from mm.checkpoint.files import temporary_name
from mm.checkpoint.weights import open_weights
from mm.cli import run as run_command
from mm.cli import videox_fun
from mm.config.run.data import FeatureSet
from mm.config.run.file import load_run, of_kind, whole_file
from mm.config.run.generation import GenerationRun
from mm.data.dataset import open_features
from mm.data.loader import feature_batches
from mm.data.sampler import BatchPlan
from mm.errors import ConfigError
from mm.lora.files import read_adapter
from mm.wan.folder import WeightFolder

MODELS = "models/Diffusion_Transformer"
TASKS = {
    "fun_control_ref": "V1.1", "fun_control": "V1.0", "fun_inp": "InP", "t2v": "T2V", "fun_camera": "Camera",
    "i2v": "I2V",
}  # fmt: skip
REFERENCE = "--train_mode=control_ref --control_ref_image=random --add_full_ref_image_in_self_attention"
LINES = {
    "wan2.1_fun/train_control.py": ("fun_control_ref", f"{REFERENCE} --trainable_modules ."),
    "wan2.1_fun/train_control_lora.py": ("fun_control", "--train_mode=control_ref --rank=4 --network_alpha=2"),
    "wan2.1_fun/train.py": ("fun_inp", "--train_mode=inpaint --trainable_modules . --image_sample_size=64"),
    "wan2.1/train.py": ("t2v", "--train_mode=normal --trainable_modules ."),
    "wan2.1_fun/train_control.py camera": ("fun_camera", "--train_mode=control_camera_ref --trainable_modules ."),
    "wan2.1/train.py i2v": ("i2v", "--train_mode=i2v --trainable_modules . --image_sample_size=64"),
}
"""A line's task and own words by its script, with the mode behind it where there are several."""
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
    write_metadata(demo, place / DATA / "metadata.json", "masks", num_rows=4)  # large, so that they are seen
    write_metadata(demo, place / DATA / "metadata_poses.json", "poses", num_rows=4)
    (place / "images").symlink_to(demo / "images")
    return place


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def words(line: str, out: Path | str, more: str = "") -> list[str]:
    """The guide's command for the embedded default: its flags, with sizes of tiny clips."""
    task, own = LINES[line]
    listed = "metadata_poses" if task == "fun_camera" else "metadata"
    return (
        f"{line.split()[0]} --config_path=config/wan2.1/wan_civitai.yaml "
        f"--pretrained_model_name_or_path={MODELS}/{TASKS[task]} --train_data_dir={DATA}/ "
        f"--train_data_meta={DATA}/{listed}.json --image_sample_size=96 --video_sample_size=32 --token_sample_size=64 "
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


LUMA = torch.tensor([0.2126, 0.7152, 0.0722])
"""Of BT.709; colours have half the rows and columns in a clip's file."""


def frames_of(clip: Path) -> torch.Tensor:
    """[F, H, W, 3] in steps of 255."""
    with av.open(str(clip)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]).float()


def decoded(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Frames of latents [C, F, H, W] by diffusers, as its pipelines decode them."""
    mean, deviation = (
        torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        pixels = vae.decode((latents.float() * deviation + mean).unsqueeze(0)).sample[0]
    return ((pixels.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0)


def require_first_batch(folder: Path, out: Path) -> None:
    """One of the stored clips, with its own control video and the image that its features are of."""
    shown = out / "sanity_check"
    (clip,) = [path for path in shown.glob("*.mp4") if not path.stem.endswith("_control")]
    assert {path.name for path in shown.iterdir()} == {
        clip.name, f"{clip.stem}_control.mp4", f"{clip.stem}_ref.gif", f"clip_{clip.stem}.png",
    }  # fmt: skip
    assert clip.stem == "a-red-circ"
    vae = AutoencoderKLWan.from_pretrained(folder / MODELS / "V1.1" / "vae")
    features = FeatureSet(path=str(out / "features" / "data.jsonl"), folder=str(out / "features"))
    config = WeightFolder.open(folder / MODELS / "V1.1").config()
    dataset = open_features(features, config)
    errors = []
    for batch in islice(feature_batches(dataset, BatchPlan(1, 1), text_len=config.text_len, seed=0), len(dataset)):
        control = batch["features"]["condition"][0, :16]
        pairs = ((clip, batch["latents"][0]), (clip.with_stem(f"{clip.stem}_control"), control))
        differences = [(frames_of(path) - decoded(vae, latents)) @ LUMA for path, latents in pairs]
        errors.append([difference.abs().mean().item() for difference in differences])
    errors.sort()
    assert max(errors[0]) < 2
    assert errors[1][0] > 4


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
    for name in ("single", "zero3"):  # by the first process alone
        require_first_batch(folder, tmp_path / name)


@pytest.mark.nightly
@pytest.mark.parametrize("script", LINES)
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


@pytest.mark.nightly
def test_parts_are_trained_at_two_rates_and_the_rest_is_frozen(folder: Path, tmp_path: Path) -> None:
    """The first step of AdamW moves each number by its rate, whatever its gradient is, and by the decay of itself."""
    flags = "--trainable_modules self_attn --trainable_modules_low_learning_rate attn ffn"
    command = words("wan2.1/train.py", tmp_path, "--lr_scheduler=constant --max_train_steps=1 --mixed_precision=no")
    drop = ("--trainable_modules", ".", "--lr_scheduler=constant_with_warmup", "--max_train_steps=2")
    videox_fun.main([word for word in command if word not in drop] + flags.split())
    written, started = tmp_path / "checkpoint-1" / "transformer", folder / MODELS / TASKS["t2v"]
    assert WeightFolder.open(written).config().num_layers == 4
    after, before = load_file(written / "diffusion_pytorch_model.safetensors"), open_weights(started)
    moved = {".self_attn.": 0.0, ".cross_attn.": 0.0, ".ffn.": 0.0}
    for name in before.shapes():
        value = before.read(name)
        kind = next((kind for kind in moved if kind in name), None)
        if kind is None:
            assert torch.equal(after[name], value), name
        else:
            decay = 1e-3 * 3e-2 * float(value.abs().max())
            moved[kind] = max(moved[kind], float((after[name] - value).abs().max()) - decay)
    assert moved == {
        ".self_attn.": pytest.approx(1e-3, rel=5e-2),
        ".cross_attn.": pytest.approx(5e-4, rel=5e-2),
        ".ffn.": pytest.approx(5e-4, rel=5e-2),
    }


CLIPS = {
    "wan2.1_fun/train_control.py camera": "images/0000_red_left_first.png,{data}/poses/0000_red_left.txt",
    "wan2.1/train.py i2v": "images/0000_red_left_first.png",
    "wan2.1_fun/train_control_lora.py": "{data}/control/0000_red_left.mp4",
}


@pytest.mark.nightly
@pytest.mark.parametrize("script", CLIPS)
def test_clips_are_those_of_the_checkpoint(folder: Path, tmp_path: Path, script: str) -> None:
    """On two processes, where one of them has nothing to render; `mm run` makes them of what stands beside the run."""
    path = CLIPS[script].format(data=DATA)
    command = words(script, tmp_path / "run", f"--validation_steps=2 --validation_paths {path} --validation_prompts")
    run_ranks(2, on_a_rank, folder, {}, [[*command, "a red circle moves left"]], timeout_s=300)
    (clip,) = (tmp_path / "run" / "sample").glob("*.mp4")
    assert clip.name == "sample-2-rank0-image-0.mp4"
    weights = tmp_path / "run" / "checkpoint-2" / "transformer"
    values = {"output.path": str(tmp_path / "clips"), "model.weights": str(weights)}
    if not weights.exists():
        base = str(folder / MODELS / TASKS[LINES[script][0]])
        adapters = [{"path": str(tmp_path / "run" / "checkpoint-2.safetensors"), "strength": 1.0}]
        values |= {"model.weights": base, "model.adapters": adapters}
    run = of_kind(load_run(tmp_path / "run" / "sample" / "run.yaml"), GenerationRun).changed(values)
    (tmp_path / "run.yaml").write_text(whole_file(run))
    run_command.main([str(tmp_path / "run.yaml")])
    difference = frames_of(clip) - frames_of(tmp_path / "clips" / "video_0000.mp4")
    assert difference.abs().max() <= 4  # of the rounding of weights or of both codecs
    assert frames_of(clip).std() > 1


@pytest.mark.nightly
def test_masks_are_shown(folder: Path, tmp_path: Path) -> None:
    """Of i2v the first frame is given, and no other."""
    videox_fun.main(words("wan2.1/train.py i2v", tmp_path))
    (mask,) = (tmp_path / "sanity_check").glob("mask_*.mp4")
    bright = frames_of(mask).mean(dim=(1, 2, 3))
    assert bright[0] > 250 and bright[1:].max() < 5
    (masked,) = (tmp_path / "sanity_check").glob("*_masked.mp4")
    clip = frames_of(masked.with_stem(masked.stem.removesuffix("_masked")))
    assert (frames_of(masked)[0] - clip[0]).abs().mean() < 8


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


@pytest.mark.nightly
def test_features_that_the_steps_make_give_the_same_losses(folder: Path, tmp_path: Path) -> None:
    line = "wan2.1_fun/train_control.py camera"
    videox_fun.main(words(line, tmp_path / "stored"))
    run_ranks(1, on_a_rank, folder, {}, [words(line, tmp_path / "live", "--live --live_budget=20MB")], timeout_s=300)
    losses = [[row["loss_hex"] for row in metrics(tmp_path / name)] for name in ("stored", "live")]
    assert losses[0] == losses[1]
    assert [json.loads(row)["encoded"] for row in (tmp_path / "live" / "live.jsonl").read_text().splitlines()] == [1, 1]
