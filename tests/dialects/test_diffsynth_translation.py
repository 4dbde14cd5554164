"""DiffSynth-Studio's command lines as sections: what each argument changes, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mm.config.diffusion import DiffusionConfig
from mm.config.model import PUBLISHED, WAN_FLF2V_14B, WAN_I2V_14B, WanConfig
from mm.config.rules.extraction import EXTRACTION_RULES
from mm.config.rules.training import TRAINING_RULES
from mm.config.trainable import names_by_pattern, patterns_of
from mm.config.unread import UNREAD, UnreadError, broken
from mm.dialects.diffsynth.named_models import named_models
from mm.dialects.diffsynth.pipeline_names import models_of, name_in_file, pipeline_name, words_of_model
from mm.dialects.diffsynth.sharding import read_launcher
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.diffsynth.translation import DiffSynthRun, FoundModels, MetadataTable, translate
from mm.dialects.diffsynth.words import PROGRAM
from mm.dialects.underscored import read_flags
from mm.wan.model import whole_shapes

T2V = PUBLISHED["Wan2.1 T2V 1.3B"]
CONTROL, REFERENCE = PUBLISHED["Wan2.1 Fun-Control 1.3B"], PUBLISHED["Wan2.1 Fun-V1.1-Control 1.3B"]
CAMERA, VACE = PUBLISHED["Wan2.1 Fun-V1.1-Control-Camera 1.3B"], PUBLISHED["Wan2.1 VACE 1.3B"]
SPEED, TI2V = PUBLISHED["Wan2.1 SpeedControl 1.3B"], PUBLISHED["Wan2.2 TI2V 5B"]
LORA = ("--lora_base_model", "dit")
COLUMNS = ("control_video", "input_image", "style")


def run(
    *words: str, shape: WanConfig = T2V, world_size: int = 1, environment: dict[str, str] | None = None
) -> DiffSynthRun:
    """Both stages of a command line with the arguments that every one has, on ten rows."""
    always = ["--dataset_metadata_path", "m.csv", "--model_paths", '["a"]']
    flags, read = read_flags(DiffSynthFlags, [*always, *words], PROGRAM, "CFG-389")
    launcher, problems = read_launcher(environment or {})
    read.problems.extend(problems)
    found = FoundModels("dit", shape, "vae", "text", "tokenizer", "clip" if shape.img_dim else None)
    table = MetadataTable(10, frozenset({"video", "prompt", *COLUMNS}))
    return translate(flags, read, found, table, launcher, world_size)


def told(described: DiffSynthRun) -> list[str]:
    """All that is wrong."""
    of_rules = (*broken(EXTRACTION_RULES, described.extraction), *broken(TRAINING_RULES, described.training))
    return [str(problem) for problem in dict.fromkeys((*described.training.problems, *of_rules))]


def values(described: DiffSynthRun) -> dict[str, Any]:
    """The values of both stages by path, those of the extraction behind `x.`."""
    extraction = {f"x.{path}": value for path, value in described.extraction.values().items()}
    return described.training.values() | extraction


SIZE = ("--height", "480", "--width", "832")
WHOLE = (*SIZE, "--trainable_models", "dit")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"x.data.path": "m.csv", "x.data.folder": ".", "x.data.format": "diffsynth", "training.steps": 10}),
        ([], {"optimizer.clip_norm": 0.0, "optimizer.weight_decay": 0.01, "model.precision": "bf16"}),
        ([], {"x.data.clip.frames.start": "first", "x.data.clip.num_frames": 81, "x.data.clip.min_num_frames": None}),
        ([], {"memory.recompute": "full", "memory.keep_attention": False, "memory.offload": False}),
        (["--use_gradient_checkpointing_offload"], {"memory.offload": True, "memory.keep_attention": True}),
        (["--dataset_base_path", "d"], {"x.data.folder": "d"}),
        ([], {"x.data.left_out": ["control_video", "input_image", "style"]}),
        (["--data_file_keys", "image,video,control_video, depth"], {"x.data.file_keys": ["control_video", "depth"]}),
        (["--dataset_repeat", "100"], {"training.steps": 1000, "checkpoint.save_interval": 1000}),
        (["--num_epochs", "5"], {"training.steps": 50, "checkpoint.save_interval": 10}),
        (["--save_steps", "3"], {"training.steps": 10, "checkpoint.save_interval": 3}),
        (["--gradient_accumulation_steps", "4"], {"training.steps": 3, "data.global_batch_size": 4}),
        (["--dataset_num_workers", "0"], {"data.workers": 0, "x.data.workers": 2}),
        (["--dataset_num_workers", "5"], {"data.workers": 5, "x.data.workers": 5}),
        (["--num_frames", "49"], {"x.data.clip.num_frames": 49}),
        (["--learning_rate", "1e-5", "--weight_decay", "0"], {"optimizer.lr": 1e-5, "optimizer.weight_decay": 0.0}),
        (["--output_path", "o"], {"checkpoint.save": "o/checkpoints", "x.output.path": "o/features"}),
        (["--height=720", "--width=1280"], {"x.data.clip.height": 720, "x.data.clip.width": 1280}),
    ],
)
def test_what_an_argument_changes(words: list[str], expected: dict[str, Any]) -> None:
    described = run(*WHOLE, *words)
    assert told(described) == []
    assert {path: values(described)[path] for path in expected} == expected


def test_without_a_size_each_sample_keeps_its_own() -> None:
    described = run("--trainable_models", "dit")
    expected = {"x.data.clip.shape.rule": "max_pixels", "x.data.clip.shape.max_pixels": 1920 * 1080}
    assert told(described) == []
    assert {path: values(described)[path] for path in expected} == expected
    assert values(run(*WHOLE[4:], "--trainable_models", "dit", "--max_pixels", "4096"))[
        "x.data.clip.shape.max_pixels"
    ] == 4096  # fmt: skip


def test_lora() -> None:
    described = run(*SIZE, *LORA, "--lora_rank", "16", "--lora_checkpoint", "l.safetensors")
    assert told(described) == []
    adapters = described.training.adapters
    assert adapters is not None
    assert (adapters.rank, adapters.alpha, adapters.base) == (16, 16.0, "dit")
    assert adapters.targets == ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    assert described.training.checkpoint.load == "l.safetensors"
    everything = run(*SIZE, *LORA, "--lora_target_modules", "", shape=WAN_FLF2V_14B, world_size=1).training.adapters
    assert everything is not None
    assert everything.targets == ["ffn.0", "ffn.2", "k", "k_img", "o", "q", "v", "v_img"]


def test_lora_of_one_of_two_models_names_its_linears() -> None:
    """PEFT finds q in each; 10 linears a block, of 30 blocks and of the 15 beside them."""
    shared = (*SIZE, "--lora_base_model")
    dit = run(*shared, "dit", "--extra_inputs", "vace_video", shape=VACE).training.adapters
    side = run(*shared, "vace", "--extra_inputs", "vace_video", shape=VACE).training.adapters
    assert dit is not None and side is not None
    assert len(dit.targets) == 300 and all(name.startswith("blocks.") for name in dit.targets)
    assert len(side.targets) == 150 and all(name.startswith("vace_blocks.") for name in side.targets)


@pytest.mark.parametrize(
    ("words", "shape", "expected"),
    [
        (("--trainable_models", "dit"), T2V, None),
        (("--trainable_models", "motion_controller"), SPEED, {"motion_controller"}),
        (("--trainable_models", "dit"), SPEED, {"dit"}),
        (("--trainable_models", " motion_controller,dit"), SPEED, None),
        (("--trainable_models", "motion_controller", *LORA), SPEED, {"motion_controller"}),
        (LORA, SPEED, None),
        (("--trainable_models", "vace"), VACE, {"vace"}),
        (("--trainable_models", "dit"), VACE, {"dit"}),
        (("--trainable_models", "dit,vace"), VACE, None),
        (("--trainable_models", "vace", *LORA), VACE, {"vace"}),
    ],
)
def test_models_that_are_trained_whole(words: tuple[str, ...], shape: WanConfig, expected: set[str] | None) -> None:
    inputs = {SPEED: "motion_bucket_id", VACE: "vace_video"}
    described = run(*SIZE, *words, *(["--extra_inputs", inputs[shape]] if shape in inputs else []), shape=shape)
    assert told(described) == []
    chosen = described.training.training.trainable
    assert (described.training.adapters is not None) == ("--lora_base_model" in words)
    if expected is None:
        assert chosen is None
        return
    assert chosen is not None
    names = whole_shapes(shape)
    (named,) = [{name for names in names_by_pattern(patterns_of(chosen), names) for name in names}]
    assert named == {name for name in names if pipeline_name(name).split(".")[1] in expected}


@pytest.mark.parametrize("shape", PUBLISHED.values(), ids=list(PUBLISHED))
def test_words_of_the_pipeline_s_models_name_each_parameter_once(shape: WanConfig) -> None:
    names = list(whole_shapes(shape))
    words = {model: patterns_of(words_of_model(model, shape)) for model in models_of(shape)}
    for model, patterns in words.items():
        assert all(names_by_pattern(patterns, names)), model
    for name in names:
        owners = [model for model, patterns in words.items() if any(one.is_in(name) for one in patterns)]
        assert owners == [pipeline_name(name).split(".")[1]]


def test_processes_and_accelerate_s_configuration(tmp_path: Path) -> None:
    def under(**environment: str) -> dict[str, Any]:
        described = run(*WHOLE, world_size=2, environment={f"ACCELERATE_{k}": v for k, v in environment.items()})
        assert told(described) == []
        return values(described)

    plain = under(MIXED_PRECISION="bf16")
    assert (plain["training.steps"], plain["data.global_batch_size"]) == (5, 2)
    assert (plain["parallel.distributed_optimizer"], plain["parallel.layerzero"]) == (False, None)
    assert under(GRADIENT_ACCUMULATION_STEPS="2")["data.global_batch_size"] == 4
    assert under(USE_DEEPSPEED="true", DEEPSPEED_ZERO_STAGE="2")["parallel.distributed_optimizer"] is True
    assert under(USE_DEEPSPEED="true", DEEPSPEED_ZERO_STAGE="3")["parallel.layerzero.zero3_size"] == 2
    assert under(USE_FSDP="true")["parallel.layerzero.zero3_size"] == 2
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}
    assert run(*WHOLE, world_size=2, environment=fsdp).training.parallel.distributed_optimizer
    assert told(run(*WHOLE, environment={**fsdp, "FSDP_SHARDING_STRATEGY": "HYBRID"}))[0].startswith("CFG-388")
    on_the_host = {"DEEPSPEED_ZERO_STAGE": "2", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert under(USE_DEEPSPEED="true", **on_the_host)["parallel.layerzero.zero3_size"] == 2
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}')
    assert under(USE_DEEPSPEED="true", DEEPSPEED_CONFIG_FILE=str(file))["parallel.layerzero.zero3_size"] == 2
    assert told(run(*WHOLE, environment={"ACCELERATE_MIXED_PRECISION": "fp16"}))[0].startswith("CFG-388")
    wrong = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "two"}
    assert told(run(*WHOLE, environment=wrong))[0].startswith("CFG-388")


def test_boundaries_are_counted_from_the_noisiest() -> None:
    """Wan2.2's experts have 358 and 642 of the 1000 steps; with shift 5 these meet near a timestep of 900."""
    levels = DiffusionConfig().levels()
    high = run(*WHOLE, "--max_timestep_boundary", "0.358").training.objective
    low = run(*WHOLE, "--min_timestep_boundary", "0.358").training.objective
    for objective, expected in ((high, levels[:358]), (low, levels[358:])):
        least, below = objective.band
        assert [level for level in levels if least <= level < below] == expected
    assert (high.band_from, low.band_below) == (levels[357], levels[357])
    assert levels[357] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "words", "task", "dropped"),
    [
        (T2V, "", "t2v", []),
        (WAN_I2V_14B, "input_image", "i2v", []),
        (WAN_I2V_14B, "input_image,end_image", "fun_inp", []),
        (WAN_FLF2V_14B, "input_image,end_image", "flf2v", []),
        (CONTROL, "control_video", "fun_control", ["start", "image"]),
        (CONTROL, "control_video,input_image", "fun_control", []),
        (REFERENCE, "control_video,reference_image", "fun_control_ref", ["start"]),
        (REFERENCE, "control_video", "fun_control_ref", ["start", "reference", "image"]),
        (VACE, "vace_video", "vace", []),
        (VACE, "vace_video,vace_reference_image", "vace", []),
        (SPEED, "motion_bucket_id", "speedcontrol", []),
    ],
)
def test_inputs_of_each_model(shape: WanConfig, words: str, task: str, dropped: list[str]) -> None:
    """Both ways to name them; what is not named is not taken from the clip either."""
    switches = [f"--input_contains_{word}" for word in words.split(",") if word]
    for given in (["--extra_inputs", words] if words else [], switches):
        described = run(*SIZE, *LORA, *given, shape=shape)
        assert told(described) == []
        others = {"input_image", "style"} | ({"control_video"} - set(words.split(",")))
        assert set(described.extraction.data.left_out) == others, "the first frame is the clip's own"
        assert described.extraction.extraction.task == task
        rates = described.training.data.condition_dropout.rates
        assert sorted(rates) == sorted(dropped) and set(rates.values()) <= {1.0}


@pytest.mark.parametrize(("words", "share"), [((), 0.0), (("--extra_inputs", "input_image"), 1.0)])
def test_a_first_frame_of_ti2v_is_the_clip_s_own(words: tuple[str, ...], share: float) -> None:
    """There `input_image` is the first frame of the video, and every sample is given it."""
    described = run(*SIZE, *LORA, *words, shape=TI2V)
    assert told(described) == []
    assert described.training.objective.first_frame_share == share
    assert "input_image" in described.extraction.data.left_out
    assert described.extraction.extraction.task == "ti2v"


def test_a_camera_s_path_comes_from_files() -> None:
    described = run(*SIZE, *LORA, "--extra_inputs", "input_image", "--data_file_keys", "video,camera", shape=CAMERA)
    assert told(described) == []
    refused = told(run(*SIZE, *LORA, "--extra_inputs", "input_image,camera_control_direction", shape=CAMERA))
    assert [line[:7] for line in refused] == ["CFG-384"] * 2 and "column camera" in refused[0]


@pytest.mark.parametrize(
    ("shape", "words", "expected"),
    [
        (T2V, ["--extra_inputs", "control_video"], "control_video is no input of T2V models; it is one of Fun-Control"),
        (T2V, ["--extra_inputs", "imput_image"], 'imput_image is no input of a Wan model. Did you mean "input_image"?'),
        (WAN_I2V_14B, [], "I2V models are given input_image, and no argument names it."),
        (WAN_FLF2V_14B, ["--extra_inputs", "input_image"], "FLF2V models are given end_image"),
        (REFERENCE, ["--extra_inputs", "control_video,input_image"], "input_image beside reference_image"),
    ],
)
def test_inputs_that_a_model_does_not_take(shape: WanConfig, words: list[str], expected: str) -> None:
    (line,) = told(run(*SIZE, *LORA, *words, shape=shape))
    assert line.startswith("CFG-384") and expected in line


@pytest.mark.parametrize(
    ("words", "shape", "expected"),
    [
        (SIZE, T2V, "CFG-385: Nothing is trained"),
        ((*SIZE, "--trainable_models", "vae"), T2V, "CFG-385: --trainable_models vae: it makes features before"),
        ((*SIZE, "--trainable_models", "ditt"), T2V, 'is not in the models that are named. Did you mean "dit"?'),
        ((*WHOLE, "--lora_checkpoint", "x"), T2V, "CFG-385: --lora_checkpoint has no effect"),
        ((*WHOLE, *LORA), T2V, "CFG-386: --trainable_models dit beside LoRA of dit"),
        ((*SIZE, "--trainable_models", "motion_controller"), T2V, "CFG-385: --trainable_models motion_controller"),
        (("--height", "480", *WHOLE[4:]), T2V, "CFG-387: --height is given without --width"),
        ((*WHOLE, "--max_pixels", "4096"), T2V, "CFG-387: --max_pixels has no effect"),
        ((*WHOLE, "--height", "481"), T2V, "CFG-051: the command line: --height is 481"),
        ((*WHOLE, "--num_frames", "80"), T2V, "CFG-050: the command line: --num_frames is 80"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: tuple[str, ...], shape: WanConfig, expected: str) -> None:
    (line,) = told(run(*words, shape=shape))
    assert expected in line


def test_both_stages_and_the_words_are_complained_of_at_once() -> None:
    lines = told(run("--height", "481", "--width", "832", "--num_frames", "80", "--learning_rate", "x"))
    assert [line[:7] for line in lines] == ["CFG-005", "CFG-385", "CFG-050", "CFG-051"]


def test_names_in_files_are_the_pipeline_s() -> None:
    lora = "blocks.0.self_attn.q.lora_A.default.weight"
    assert name_in_file(lora, "pipe.dit.") == lora
    assert name_in_file(lora, "") == f"pipe.dit.{lora}"
    assert name_in_file("vace_blocks.0.ffn.0.weight", "pipe.vace.") == "vace_blocks.0.ffn.0.weight"
    assert name_in_file("vace_blocks.0.ffn.0.weight", "pipe.dit.") == "pipe.vace.vace_blocks.0.ffn.0.weight"
    assert name_in_file("vace_blocks.0.ffn.0.weight", "pipe.dit.,pipe.vace.") == "vace_blocks.0.ffn.0.weight"
    motion = "motion_controller.linear.0.weight"
    assert name_in_file(motion, "pipe.dit.,pipe.") == motion
    assert name_in_file(motion, "pipe.motion_controller.") == "linear.0.weight"


@pytest.mark.parametrize("stage", ["training", "extraction"])
def test_no_rule_fails_over_what_could_not_be_read(stage: str) -> None:
    """Every section, and every value of each, unread by itself."""
    described = getattr(run(*SIZE, *LORA), stage)
    rules: Any = TRAINING_RULES if stage == "training" else EXTRACTION_RULES
    changes: list[dict[str, Any]] = []
    for name in type(described).sections.model_fields:
        section = getattr(described, name)
        values = type(section).model_fields if isinstance(section, BaseModel) else {}
        changes += [{name: UNREAD}, *({name: section.model_copy(update={value: UNREAD})} for value in values)]
    assert len(changes) > 20
    for change in changes:
        list(broken(rules, described.model_copy(update=change)))  # an UnreadError is its end


def test_boundaries_that_leave_no_steps_are_told_in_their_own_words() -> None:
    for first, end in (("0.9", "0.1"), ("0.5", "0.5"), ("0", "0")):
        words = (*SIZE, *LORA, "--min_timestep_boundary", first, "--max_timestep_boundary", end)
        [line] = told(run(*words))
        assert line.startswith(f"CFG-447: --min_timestep_boundary {float(first)} ")
    lines = told(run(*SIZE, *LORA, "--max_timestep_boundary", "1.9", "--min_timestep_boundary", "x"))
    assert [line[:7] for line in lines] == ["CFG-005", "CFG-005"]


def test_accelerate_s_word_for_the_cpu_is_that_of_both_stages() -> None:
    for variables, device in (({"ACCELERATE_USE_CPU": "true"}, "cpu"), ({"ACCELERATE_USE_CPU": "False"}, None)):
        described = run(*SIZE, *LORA, environment=variables)
        assert (described.extraction.extraction.device, described.training.training.device) == (device, device)


def test_accelerate_and_the_command_line_accumulate_alike() -> None:
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    [line] = told(run(*SIZE, *LORA, "--gradient_accumulation_steps", "2", environment=environment))
    assert line.startswith("CFG-388") and "is 4, and --gradient_accumulation_steps 2" in line
    assert not told(run(*SIZE, *LORA, "--gradient_accumulation_steps", "4", environment=environment))
    environment = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}  # which accelerate fills in itself
    assert not told(run(*SIZE, *LORA, "--gradient_accumulation_steps", "2", environment=environment))


def test_no_value_that_cannot_be_is_the_end_of_reading() -> None:
    for value in ("", "=x"):
        lines = [told(run(*SIZE, *LORA, f"--{name}{value}")) for name in DiffSynthFlags.model_fields]
        assert sum(map(bool, lines)) > 20  # others are texts, or have no value
    flags, _ = read_flags(DiffSynthFlags, ["--model_paths", "--learning_rate", "1"], PROGRAM, "CFG-389")
    with pytest.raises(UnreadError):  # and nothing else; of the flag itself the user is told already
        named_models(flags)
