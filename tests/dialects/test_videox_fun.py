"""Command lines of VideoX-Fun's guide as runs, unchanged, and what is wrong in others."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from videox_fun_files import DATA, commands_in, home

from mm.cli.videox_fun import check, shape_of
from mm.config.rules.training import check_training
from mm.config.run.shapes import TokenLength
from mm.dialects.launcher import read_launch
from mm.dialects.videox_fun.accelerate import Launched, read_launch_words
from mm.dialects.videox_fun.command import Command, read_command, script_of
from mm.errors import ConfigError

MODELS = "models/Diffusion_Transformer"
V11, V10 = f"{MODELS}/Wan2.1-Fun-V1.1-14B-Control", f"{MODELS}/Wan2.1-Fun-14B-Control"
INP, T2V, CAMERA = f"{MODELS}/Wan2.1-Fun-14B-InP", f"{MODELS}/Wan2.1-T2V-14B", f"{MODELS}/Camera"
TASKS = {V11: "fun_control_ref", V10: "fun_control", INP: "fun_inp", T2V: "t2v", CAMERA: "fun_camera"}
FILES = f"--train_data_dir={DATA} --train_data_meta={DATA}/metadata.json"


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return home(demo, tmp_path_factory.mktemp("videox"), TASKS)


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    shutil.rmtree(folder / "output_dir", ignore_errors=True)


@pytest.fixture(scope="module")
def guide() -> str:
    place = os.environ.get("MM_GUIDES")
    if not place:
        pytest.skip("MM_GUIDES names no folder of guides")
    return (Path(place) / "videox-fun-control.md").read_text()


def place(world_size: int) -> dict[str, str]:
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}


def read(script: str, words: str, world_size: int = 1, **variables: str) -> Command:
    """A command that was read and checked."""
    found = script_of(script)
    assert found is not None
    environment = place(world_size) | variables
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        command = read_command(found, words.split(), environment, shape_of)
    check(command)
    return command


def control(words: str = "", world_size: int = 1, **variables: str) -> Command:
    """V1.1's control with few words of its own."""
    mode = "--train_mode=control_ref --control_ref_image=random --add_full_ref_image_in_self_attention"
    needed = f"--pretrained_model_name_or_path={V11} {FILES} {mode} --trainable_modules . --enable_bucket"
    frames = "--video_sample_n_frames=9 --train_batch_size=1"
    return read("scripts/wan2.1_fun/train_control.py", f"{needed} {frames} {words}", world_size, **variables)


def ids(call: Any, *arguments: Any, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **more)
    return [problem.id for problem in caught.value.problems]


def test_every_training_command_of_the_guide_is_read_unchanged(guide: str) -> None:
    """Six of them: V1.1 and V1.0, each plain, with ZeRO-2 and with ZeRO-3."""
    found = []
    for exported, words in commands_in(guide):
        if "zero_to_bf16.py" in " ".join(words) or "xxx.py" in words[-1]:
            continue
        assert words[:2] == ["accelerate", "launch"]
        launched = read_launch_words(words[2:], devices=8)
        torchrun, script = launched.torchrun[:2], launched.torchrun[2]
        assert torchrun == ["--standalone", "--nproc-per-node=8"]
        command = read(script, " ".join(launched.torchrun[3:]), 8, **exported, **launched.variables)
        found.append((command, launched.variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")))
    assert [config for _, config in found] == 2 * [
        None,
        "config/zero_stage2_config.json",
        "config/zero_stage3_config.json",
    ]
    for number, (command, config) in enumerate(found):
        training, extraction = command.training, command.extraction
        assert extraction.task.name == ("fun_control_ref" if number < 3 else "fun_control")
        assert training.wan.task is extraction.task
        clip = extraction.data.clip
        assert (clip.num_frames, clip.frame_interval, clip.min_num_frames) == (81, 2, 1)
        rule = clip.shape
        assert isinstance(rule, TokenLength)
        assert (rule.min_side, rule.max_side, rule.token_side, rule.token_side_share) == (256, 1024, 512, 0.5)
        assert extraction.data.path == "datasets/internal_datasets/metadata.json"
        assert extraction.output.path == "output_dir/features"
        assert training.training.steps == 100 * 2  # 16 clips, 8 in a step
        assert training.training.seed == extraction.extraction.seed == 42
        update = training.optimizer
        assert (update.lr, update.weight_decay, update.eps, update.clip_norm) == (2e-5, 3e-2, 1e-10, 0.05)
        assert (update.initial_clip_ratio, update.abnormal_clip_start) == (5.0, 1000)
        assert (update.decay, update.warmup_steps) == ("constant", 100)
        assert (training.objective.shift, training.objective.loss_weighting) == (5.0, "none")
        assert (training.dtype, training.memory.recompute) == ("bf16", "full")
        assert (training.checkpoint.save_interval, training.checkpoint.save) == (50, "output_dir")
        dropped = {"control": 0.1, "start": 0.1, "image": 0.1} | ({"reference": 0.1} if number < 3 else {})
        assert training.data.condition_dropout.rates == dropped
        assert training.data.caption_dropout == 0.1
        stage2, stage3 = (config is not None and f"stage{stage}" in config for stage in (2, 3))
        assert training.parallel.distributed_optimizer is stage2
        assert (training.parallel.layerzero is not None) is stage3
        if training.parallel.layerzero is not None:
            assert training.parallel.layerzero.zero3_size == 8


def test_processes_of_several_machines_are_torchruns(guide: str) -> None:
    filled = guide.replace("your master address", "10.0.0.1")
    ((exported, words),) = (found for found in commands_in(filled) if found[1][-1].endswith("xxx.py"))
    assert (exported["WORLD_SIZE"], exported["RANK"]) == ("1", "0")  # of machines
    launched = read_launch_words(words[2:], devices=0)
    assert launched.torchrun == ["--standalone", "--nproc-per-node=8", "scripts/wan2.1_fun/xxx.py"]
    two = [
        word.replace("num_machines=1", "num_machines=2").replace("machine_rank=0", "machine_rank=1") for word in words
    ]
    assert read_launch_words(two[2:], devices=8).torchrun[:5] == [
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=4",
        "--master-addr=10.0.0.1",
        "--master-port=10086",
    ]


def test_a_script_alone_is_one_process_where_the_guide_counts_machines() -> None:
    script = script_of("scripts/wan2.1/train.py")
    assert script is not None
    words = f"--pretrained_model_name_or_path={T2V} {FILES} --trainable_modules . --enable_bucket".split()
    alone = read_command(script, words, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "a"}, shape_of)
    assert (alone.place.world_size, alone.training.problems) == (1, ())
    several = read_command(script, words, {"WORLD_SIZE": "2", "RANK": "0"}, shape_of)
    assert [problem.id for problem in several.training.problems] == ["CFG-342"]


MODES = {
    "t2v": ("wan2.1/train.py", T2V, "normal"),
    "fun_inp": ("wan2.1_fun/train.py", INP, "inpaint"),
    "fun_control": ("wan2.1_fun/train_control.py", V10, "control_ref"),
    "fun_camera": ("wan2.1_fun/train_control.py", CAMERA, "control_ref_camera"),
}


@pytest.mark.parametrize("task", MODES)
def test_modes_are_tasks(task: str) -> None:
    script, model, mode = MODES[task]
    words = f"--pretrained_model_name_or_path={model} {FILES} --train_mode {mode} --trainable_modules . --enable_bucket"
    assert read(script, words).extraction.task.name == task
    if task == "fun_camera":  # as the code has it
        assert read(script, words.replace(mode, "control_camera_ref")).extraction.task.name == task


def test_noise_levels_are_those_of_the_flags() -> None:
    objective = control("--uniform_sampling").training.objective
    assert (objective.timestep_sampling, objective.timestep_slices, objective.loss_weighting) == (
        "grid",
        "step",
        "none",
    )
    assert control("--weighting_scheme=cosmap").training.objective.loss_weighting == "cosmap"
    normal = control("--weighting_scheme=logit_normal --logit_mean=0.5 --logit_std=0.8").training.objective
    assert (normal.timestep_sampling, normal.logit_mean, normal.logit_std) == ("logit_normal", -0.5, 0.8)
    mode = control("--weighting_scheme=mode --mode_scale=0.8").training.objective
    assert (mode.timestep_sampling, mode.mode_scale, mode.loss_weighting) == ("mode", 0.8, "none")
    assert control("--weighting_scheme=mode").training.objective.mode_scale == 1.29
    for scheme in ("logit_normal", "mode"):
        assert ids(control, f"--weighting_scheme={scheme} --uniform_sampling") == ["CFG-341"]


def test_the_loss_of_motion_is_that_of_the_flags() -> None:
    assert control("").training.objective.motion_loss_ratio is None
    assert control("--motion_sub_loss").training.objective.motion_loss_ratio == 0.25
    assert control("--motion_sub_loss --motion_sub_loss_ratio=0.5").training.objective.motion_loss_ratio == 0.5
    alone = control("--motion_sub_loss_ratio=0.5").training
    assert alone.objective.motion_loss_ratio is None
    assert any(note.startswith("--motion_sub_loss_ratio changes nothing") for note in alone.notes)


def test_limits_of_the_norm_are_those_of_the_flags() -> None:
    given = control("--initial_grad_norm_ratio=2 --abnormal_norm_clip_start=30").training.optimizer
    assert (given.initial_clip_ratio, given.abnormal_clip_start) == (2.0, 30)
    off = control("--max_grad_norm=0").training.optimizer
    assert (off.clip_norm, off.initial_clip_ratio, off.abnormal_clip_start) == (0.0, None, None)
    words = f"--pretrained_model_name_or_path={V10} {FILES} --train_mode=control_ref --enable_bucket"
    adapters = read("wan2.1_fun/train_control_lora.py", words).training.optimizer
    assert (adapters.clip_norm, adapters.abnormal_clip_start) == (1.0, None), "no flags of its script"
    with pytest.raises(ConfigError, match=r"CFG-425.*--abnormal_norm_clip_start 30 has no effect with --max_grad_norm"):
        check_training(control("--max_grad_norm=0 --abnormal_norm_clip_start=30").training)


def test_both_orders_of_sizes_are_the_same_sides() -> None:
    token = "--random_hw_adapt --training_with_video_token_length --token_sample_size=512"
    runs = [control(f"{token} --video_sample_size={a} --image_sample_size={b}") for a, b in ((256, 1024), (1024, 256))]
    rules = [run.extraction.data.clip.shape for run in runs]
    assert rules[0] == rules[1]
    assert any("sides from 256 to 1024" in note for note in runs[1].training.notes)


def test_steps_are_passes_over_the_rows() -> None:
    assert control("--num_train_epochs=3").training.training.steps == 48
    assert control("--num_train_epochs=3 --gradient_accumulation_steps=2", 3).training.training.steps == 9  # of 6
    assert control("--num_train_epochs=3 --max_train_steps=7").training.training.steps == 7
    assert control("--num_train_epochs=3 --video_repeat=2").training.training.steps == 96
    assert control("--num_train_epochs=3 --feature_draws=5").extraction.extraction.draws == 5


def test_what_changes_nothing_is_noted_and_what_cannot_be_had_is_refused_at_once() -> None:
    notes = control("--noise_offset=0.1 --snr_loss --low_vram --validation_steps=7 --mode_scale=1").training.notes
    told = {"--low_vram", "--snr_loss", "--noise_offset", "--mode_scale"}
    assert {note.split()[0] for note in notes} == told
    wrong = "--use_came --use_8bit_adam --weighting_scheme=mode --uniform_sampling --mixed_precision=fp16"
    wrong += " --rank=4 --learning_rat=1"
    assert sorted(ids(control, wrong)) == ["CFG-007", "CFG-008", "CFG-341", "CFG-341", "CFG-341", "CFG-341"]


def modes(task: str, words: str) -> Command:
    script, model, mode = MODES[task]
    own = f"--train_mode {mode} --trainable_modules . --enable_bucket --train_batch_size=1 --video_sample_n_frames=9"
    return read(script, f"--pretrained_model_name_or_path={model} {FILES} {own} {words}")


def test_validation_prompts_are_a_generation_of_the_task() -> None:
    """Size, sampler and guidance as VideoX-Fun renders them."""
    video, poses = (f"{DATA}/{name}" for name in ("control/0000_red_left.mp4", "poses/0000_red_left.txt"))
    image = f"{DATA}/image.png"
    Path(image).write_bytes(b"")
    given = {"fun_control": video, "fun_inp": image, "fun_camera": f"{image},{poses}"}
    lists = {"fun_control": ["controls"], "fun_inp": ["images"], "fun_camera": ["images", "cameras"], "t2v": []}
    for task, names in lists.items():
        paths = f"--validation_paths {given[task]} {given[task]}" if task in given else ""
        command = modes(task, f"--validation_prompts red blue --video_sample_size=72 --output_dir=output_dir {paths}")
        assert command.clips is not None
        run, folder = command.clips.run, Path("output_dir/sample")
        assert sorted(run.inputs.lists) == sorted(names)
        parts = given[task].split(",") if names else []
        expected = {folder / f"{name}.txt": [part] * 2 for name, part in zip(names, parts, strict=True)}
        assert command.clips.lists == {folder / "prompts.txt": ["red", "blue"]} | expected
        assert (run.output.size, run.output.fps) == ((9, 64, 64), 16)
        sampling = run.sampling
        assert (sampling.solver, sampling.steps, sampling.guidance_scale, sampling.shift) == ("euler", 25, 4.5, 5.0)
        assert (run.encoders.image is not None) is (task in ("fun_inp", "fun_camera"))
        asked = command.training.validation
        assert asked is not None
        assert (asked.interval, asked.config) == (2000, str(folder / "run.yaml"))
    words = "--validation_prompts red --validation_epochs=3"
    alone = modes("fun_inp", words)  # of text alone, which a mask of everything is
    assert alone.clips is not None and alone.clips.run.inputs.text_only
    assert alone.training.validation is not None and alone.training.validation.interval == 3 * 16
    both = modes("t2v", "--validation_prompts red --validation_steps=7 --validation_epochs=2").training
    assert any("--validation_epochs 2 adds no clips" in note for note in both.notes)
    assert both.validation is not None and both.validation.interval == 7
    assert modes("t2v", "--validation_prompts red --validation_steps=7").training.validation.interval == 7  # type: ignore[union-attr]


def test_features_may_be_made_in_the_steps() -> None:
    """A new draw each pass, where stored ones are four at most."""
    live = control("--num_train_epochs=9 --live --live_budget=1GB --output_dir=output_dir")
    assert live.live is not None
    assert (live.live.extractions, live.live.budget) == (("output_dir/features.yaml",), "1GB")
    assert live.extraction.extraction.draws == 9
    stored = control("--num_train_epochs=9")
    assert (stored.live, stored.extraction.extraction.draws) == (None, 4)
    assert ids(control, "--live_budget=1GB") == ["CFG-434"]


def test_validation_that_cannot_be_is_told_at_once() -> None:
    found = {
        ("fun_control", "--validation_prompts red"): ["CFG-430"],
        ("fun_control", "--validation_prompts red --validation_paths a.mp4 b.mp4"): ["CFG-430"],
        ("fun_control", "--validation_prompts red blue --validation_paths a.mp4 b.mp4"): ["CFG-430", "CFG-430"],
        ("fun_control", "--validation_paths a.mp4"): ["CFG-430"],
        ("fun_camera", "--validation_prompts red --validation_paths a.txt"): ["CFG-430"],
        ("t2v", "--validation_prompts red --validation_paths a.mp4"): ["CFG-430"],
    }
    for (task, words), expected in found.items():
        assert ids(modes, task, words) == expected, (task, words)
    script = script_of("wan2.1/train.py")
    assert script is not None
    words = [
        "--validation_prompts",
        "a\nb",
        " ",
        "--use_came",
        *f"--pretrained_model_name_or_path={T2V} {FILES}".split(),
    ]
    command = read_command(script, [*words, "--trainable_modules", "."], place(1), shape_of)
    assert [problem.id for problem in command.training.problems] == ["CFG-341", "CFG-431", "CFG-431"]


def test_models_and_modes_that_do_not_fit_are_named() -> None:
    needed = f"{FILES} --trainable_modules . --enable_bucket"
    fun = "wan2.1_fun/train.py"
    assert ids(read, fun, f"--pretrained_model_name_or_path={INP} --train_mode normal {needed}") == ["CFG-344"]
    assert ids(read, fun, f"--pretrained_model_name_or_path={INP} --train_mode inpainting {needed}") == ["CFG-344"]
    full = f"--pretrained_model_name_or_path={V11} --train_mode control_ref {needed}"
    assert ids(read, "wan2.1_fun/train_control.py", full) == ["CFG-345", "CFG-345"]
    alone = full.replace("control_ref", "control")
    assert ids(read, "wan2.1_fun/train_control.py", alone) == ["CFG-344"]


def test_files_that_are_not_there_are_told_with_everything_else(folder: Path) -> None:
    words = f"--pretrained_model_name_or_path=nowhere --train_data_dir={DATA} --train_data_meta=none.json --seed=x"
    script = "wan2.1/train.py"
    found = ids(read, script, f"{words} --config_path=none.yaml")
    assert found == ["CFG-005", "DATA-020", "CFG-346", "CFG-001", "CFG-348"]


def test_parts_that_are_trained() -> None:
    """The first list has the rate, the second one half of it where the first does not name the parameter too."""

    def trained(words: str) -> tuple[str, ...] | None:
        needed = f"--pretrained_model_name_or_path={T2V} {FILES} --enable_bucket --train_mode normal"
        frames = "--video_sample_n_frames=9 --train_batch_size=1"
        return read("scripts/wan2.1/train.py", f"{needed} {frames} {words}").training.training.trainable

    slower = "--trainable_modules_low_learning_rate"
    assert trained("--trainable_modules .") is None
    assert trained("--trainable_modules . attn") is None
    assert trained("--trainable_modules self_attn ffn") == ("self_attn", "ffn")
    assert trained(f"--trainable_modules self_attn {slower} attn norm") == ("self_attn", "attn:0.5", "norm:0.5")
    assert ids(trained, "") == ["CFG-348"]
    assert ids(trained, "--trainable_modules attn1") == ["CFG-420"]
    assert ids(trained, "--trainable_modules self_attn:2") == ["CFG-420"]
    assert ids(trained, f"--trainable_modules . {slower} ffn") == ["CFG-421"]
    assert ids(trained, f"--trainable_modules attn {slower} self_attn k_img") == ["CFG-421", "CFG-420"]


def test_the_launcher_and_the_script_must_agree(folder: Path) -> None:
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json"}

    def with_file(words: str, **values: Any) -> list[str]:
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | values))
        return ids(control, f"--use_deepspeed {words}", 2, **deepspeed)

    assert ids(control, "--use_deepspeed") == ["CFG-342"]
    assert ids(control, "", ACCELERATE_USE_DEEPSPEED="true") == ["CFG-342"]
    assert ids(control, "--mixed_precision=no", ACCELERATE_MIXED_PRECISION="bf16") == ["CFG-342"]
    assert with_file("", train_micro_batch_size_per_gpu=3, gradient_clipping=0.5) == ["CFG-342", "CFG-342"]
    assert with_file("--mixed_precision=no", bf16={"enabled": True}) == ["CFG-342"]
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert with_file("", zero_optimization=offload, optimizer={"type": "Adam"}) == ["CFG-343", "CFG-343"]
    assert with_file("", zero_optimisation={}) == ["CFG-003"]
    assert ids(read_launch_words, ["--num_processes=3", "--num_machines=2"], 0) == ["CFG-350", "CFG-350", "CFG-350"]


def test_a_run_that_is_there_is_gone_on_with_only_when_asked(folder: Path) -> None:
    for step in (2, 10):
        (folder / "output_dir" / f"iter_{step:07d}").mkdir(parents=True)
    (folder / "output_dir" / "checkpoint-10-outputs").mkdir()
    here = "--output_dir=output_dir"
    assert ids(control, here) == ["CFG-349"]
    assert control(f"{here} --resume_from_checkpoint=latest").training.checkpoint.load == V11
    assert control(f"{here} --resume_from_checkpoint=checkpoint-10").training.checkpoint.load == V11
    assert control("--output_dir=other --resume_from_checkpoint=output_dir/checkpoint-10").training.checkpoint.load == (
        "output_dir"
    )
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-10-outputs"):
        assert ids(control, f"{here} --resume_from_checkpoint={name}") == ["CFG-349"]


def test_adapters_are_those_of_the_script() -> None:
    words = f"--pretrained_model_name_or_path={V10} {FILES} --train_mode=control_ref --enable_bucket"
    script = "wan2.1_fun/train_control_lora.py"
    adapters = read(script, f"{words} --rank=64 --network_alpha=32 --target_name=q,k,v,ffn.0,ffn.2").training.adapters
    assert adapters is not None
    assert (adapters.rank, adapters.alpha, adapters.base) == (64, 32.0, V10)
    assert adapters.targets == ["q", "k", "v", "ffn.0", "ffn.2"]
    skipped = read(script, f"{words} --lora_skip_name=cross_attn,blocks.0.").training.adapters
    assert skipped is not None and skipped.skip == ["cross_attn", "blocks.0."]
    assert read(script, words).training.adapters.targets[-2:] == ["k_img", "v_img"]  # type: ignore[union-attr]


CONFIG = """\
compute_environment: LOCAL_MACHINE
debug: false
deepspeed_config:
  deepspeed_multinode_launcher: standard
  gradient_accumulation_steps: 2
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
downcast_bf16: 'no'
dynamo_config: {}
gpu_ids: all
machine_rank: 0
main_process_ip: 10.0.0.1
main_process_port: 10086
main_training_function: main
mixed_precision: bf16
num_machines: 2
num_processes: 4
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
"""As `accelerate config` writes it."""


def launch_by_file(folder: Path, text: str, *words: str) -> Launched:
    (folder / "accelerate.yaml").write_text(text)
    return read_launch_words(["--config_file", "accelerate.yaml", *words, "a.py", "--b"], 0)


def test_a_configuration_file_of_accelerate_is_its_words(folder: Path) -> None:
    said = [
        "--use_deepspeed",
        "--zero_stage",
        "3",
        "--mixed_precision",
        "bf16",
        "--num_machines",
        "2",
        "--num_processes",
        "4",
        "--main_process_ip",
        "10.0.0.1",
        "--main_process_port",
        "10086",
        "--gradient_accumulation_steps",
        "2",
        "--machine_rank",
    ]
    for rank in ("0", "1"):
        expected = read_launch_words([*said, rank, "a.py", "--b"], 0)
        found = launch_by_file(folder, CONFIG, *(["--machine_rank", rank] if rank == "1" else []))
        assert found.torchrun == expected.torchrun
        none = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE": "none" for part in ("OPTIMIZER", "PARAM")}
        assert found.variables == expected.variables | none
    run = control("--use_deepspeed --gradient_accumulation_steps=2", 4, **found.variables).training
    assert run.parallel.layerzero is not None and run.dtype == "bf16"
    assert ids(control, "--use_deepspeed --gradient_accumulation_steps=3", 4, **found.variables) == ["CFG-342"]
    sharded = CONFIG.replace("DEEPSPEED", "FSDP").replace("num_machines: 2", "num_machines: 1")
    sharded += "fsdp_config: {fsdp_sharding_strategy: FULL_SHARD, fsdp_offload_params: false}\n"
    variables = launch_by_file(folder, sharded).variables
    assert variables["ACCELERATE_USE_FSDP"] == "true" and "ACCELERATE_USE_DEEPSPEED" not in variables
    assert control("--use_fsdp", 4, **variables).training.parallel.layerzero is not None


def test_accelerate_itself_reads_the_same_file_so(folder: Path) -> None:
    """The variables that accelerate's own launcher makes of it, where it is installed."""
    commands = pytest.importorskip("accelerate.commands.launch")
    (folder / "accelerate.yaml").write_text(CONFIG.replace("num_machines: 2", "num_machines: 1"))
    parser = commands.launch_command_parser()
    arguments, _, _ = commands._validate_launch_command(
        parser.parse_args(["--config_file", str(folder / "accelerate.yaml"), "a.py"])
    )
    ours = launch_by_file(folder, CONFIG.replace("num_machines: 2", "num_machines: 1"))
    assert ours.torchrun[:2] == ["--standalone", f"--nproc-per-node={arguments.num_processes}"]
    assert (arguments.use_deepspeed, arguments.zero_stage, arguments.mixed_precision) == (True, 3, "bf16")
    read, problems = read_launch(ours.variables)
    assert not problems
    assert (read.deepspeed, read.zero_stage, read.mixed_precision) == (True, 3, "bf16")
    assert read.accumulation == arguments.gradient_accumulation_steps == 2


def test_what_of_such_a_file_cannot_be_is_told_at_once(folder: Path) -> None:
    wrong = CONFIG.replace("dynamo_config: {}", "dynamo_config: {dynamo_backend: INDUCTOR}").replace(
        "gpu_ids: all", "gpu_ids: 0,1"
    )
    words = ("--num_processes=8", "--mixed_precision=no", "--use_fsdp", "--num_machines=2")
    assert sorted(ids(launch_by_file, folder, wrong, *words)) == ["CFG-342"] * 3 + ["CFG-433"] * 2
    assert ids(launch_by_file, folder, CONFIG + "num_procesess: 3\n") == ["CFG-003"]
    assert ids(launch_by_file, folder, CONFIG.replace("zero_stage: 3", "zero_stage: 4")) == ["CFG-005"]
    assert ids(read_launch_words, ["--config_file=none.yaml", "a.py"], 0) == ["CFG-001"]


def test_original_encoder_files_are_read_where_they_lie(folder: Path, tmp_path: Path) -> None:
    """So that a store of features knows of them: a copy that was made once would hide that a model is another one."""
    model = tmp_path / "model"
    shutil.copytree(folder / T2V, model)
    for name in ("vae", "text_encoder"):
        shutil.rmtree(model / name)
    files = {"vae": model / "Wan2.1_VAE.pth", "text": model / "models_t5_umt5-xxl-enc-bf16.pth"}
    for file in files.values():
        file.touch()
    words = f"--pretrained_model_name_or_path={model} {FILES} --train_mode=normal --trainable_modules ."
    encoders = read("scripts/wan2.1/train.py", f"{words} --video_sample_n_frames=9").extraction.encoders
    assert {name: Path(getattr(encoders, name).from_pretrained) for name in files} == files


@pytest.mark.parametrize("name", ["wan2.1_fun/train_control.py", "wan2.1_fun/train_control_lora.py"])
def test_no_value_that_cannot_be_is_the_end_of_reading(name: str) -> None:
    script = script_of(f"scripts/{name}")
    assert script is not None
    shape, refused = shape_of(V11), 0
    words = [f"--pretrained_model_name_or_path={V11}", *FILES.split(), "--train_mode=control_ref"]
    for flag in script.flags.model_fields:
        command = read_command(script, [*words, f"--{flag}=x"], {}, lambda _: shape)
        with suppress(ConfigError):
            check(command)
        refused += any(f'--{flag} is "x"' in str(problem) for problem in command.training.problems)
    assert refused > 20  # others are texts, or have no value
