"""DiffSynth-Studio's arguments: those of its guide as they stand there, and of each what it does here."""

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.config.unread import Unread
from mm.dialects.diffsynth.named_models import NamedModel, named_models
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.dialects.diffsynth.words import PROGRAM
from mm.dialects.underscored import read_flags
from mm.errors import ConfigError

LATER = """max_pixels dataset_num_workers tokenizer_path audio_processor_path weight_decay customized_optimizer
gradient_accumulation_steps save_steps lora_checkpoint preset_lora_path preset_lora_model resume_from_checkpoint
extra_inputs use_gradient_checkpointing find_unused_parameters fp8_models offload_models quant_options
enable_model_cpu_offload enable_optimizer_cpu_offload cpu_offload_split_threshold task max_timestep_boundary
min_timestep_boundary initialize_model_on_cpu enable_tensorboard_log enable_swanlab_log enable_wandb_log enable_csv_log
tensorboard_project swanlab_project wandb_project csv_project"""
"""Arguments that came after the guide."""


@pytest.fixture(scope="module")
def guide() -> str:
    folder = os.environ.get("MM_GUIDES")
    if not folder:
        pytest.skip("MM_GUIDES is not set; it names a folder with diffsynth-wan.md")
    return (Path(folder) / "diffsynth-wan.md").read_text()


def snippets(guide: str) -> Iterator[str]:
    """What the guide shows of command lines: blocks of a shell, and words between backticks."""
    for block in re.findall(r"```shell\n(.*?)```", guide, re.DOTALL):
        if block.startswith("--"):
            yield block.rstrip().removesuffix("\\")
    yield from re.findall(r"`(--\w[^`]*)`", guide)


def read(*words: str) -> tuple[DiffSynthFlags, list[str], list[str]]:
    """Flags, problems and notes of a command line with the one argument that every one has."""
    flags, told = read_flags(DiffSynthFlags, ["--dataset_metadata_path", "m.csv", *words], PROGRAM, "CFG-389")
    return flags, [str(problem) for problem in told.problems], told.notes


def test_every_argument_of_the_guide_is_one_here(guide: str) -> None:
    listed = set(re.findall(r"^ +\* `--(\w+)`", guide, re.MULTILINE))
    assert len(listed) == 25
    assert listed <= set(DiffSynthFlags.model_fields)


def test_arguments_that_came_later_are_known() -> None:
    assert set(LATER.split()) <= set(DiffSynthFlags.model_fields)


def test_every_command_line_of_the_guide_is_read_as_it_stands(guide: str) -> None:
    whole = [shlex.split(text) for text in snippets(guide)]
    shown = [words for words in whole if len(words) > 1]
    assert len(shown) >= 6
    for words in shown:
        flags, problems, _ = read(*words)
        assert problems == [], words
        assert not any(isinstance(value, Unread) for value in flags.model_dump().values())
        if flags.model_paths or flags.model_id_with_origin_paths:
            assert named_models(flags)


def test_the_guide_s_models_by_id_and_by_path(guide: str) -> None:
    by_id, by_path = (
        named_models(read(*words)[0])
        for words in (shlex.split(text) for text in snippets(guide))
        if any(word.startswith("--model_") for word in words) and len(words) > 1
    )
    wan = "Wan-AI/Wan2.1-T2V-1.3B"
    assert [(one.model_id, one.pattern) for one in by_id] == [
        (wan, "diffusion_pytorch_model*.safetensors"), (wan, "models_t5_umt5-xxl-enc-bf16.pth"), (wan, "Wan2.1_VAE.pth")
    ]  # fmt: skip
    home = "models/Wan-AI/Wan2.1-T2V-14B"
    assert [len(one.paths) for one in by_path] == [6, 1, 1]
    assert by_path[0].paths[5] == f"{home}/diffusion_pytorch_model-00006-of-00006.safetensors"
    assert by_path[2] == NamedModel("--model_paths", (f"{home}/Wan2.1_VAE.pth",))


def test_defaults_are_theirs() -> None:
    flags, problems, notes = read()
    assert problems == notes == []
    expected = {
        "dataset_base_path": "", "height": None, "width": None, "num_frames": 81, "data_file_keys": "image,video",
        "dataset_repeat": 1, "learning_rate": 1e-4, "num_epochs": 1, "output_path": "./models", "weight_decay": 0.01,
        "remove_prefix_in_ckpt": "pipe.dit.", "lora_target_modules": "q,k,v,o,ffn.0,ffn.2", "lora_rank": 32,
        "min_timestep_boundary": 0.0, "max_timestep_boundary": 1.0,
    }  # fmt: skip
    assert {name: getattr(flags, name) for name in expected} == expected


def test_everything_that_is_wrong_is_told_at_once_in_their_spelling() -> None:
    _, problems, notes = read(
        "--learning_rate", "fast", "--num_epoch", "2", "--enable_wandb_log", "--preset_lora_path", "x",
        "--resume_from_checkpoint", "y", "--find_unused_parameters",
    )  # fmt: skip
    told = "\n".join(problems)
    for expected in (
        "CFG-005: --learning_rate is", "CFG-007: --num_epoch is not a flag", "--num_epochs",
        "CFG-389: --enable_wandb_log", "CFG-389: --preset_lora_path", "CFG-389: --resume_from_checkpoint",
    ):  # fmt: skip
        assert expected in told
    assert len(problems) == 5
    assert notes == ["--find_unused_parameters changes nothing: each parameter gets its gradient in each step"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model_paths", "[1, ["], "CFG-380: --model_paths is no JSON"),
        (["--model_paths", '[1, [], ["a", 2]]'], "CFG-380: --model_paths holds 1, and no path"),
        (["--model_id_with_origin_paths", "Wan-AI/Wan2.1-T2V-1.3B"], "CFG-381"),
        (["--model_id_with_origin_paths", "a:b,Wan-AI/x:"], "CFG-381"),
        ([], "CFG-381: No models are named"),
    ],
)
def test_models_that_cannot_be_meant(words: list[str], expected: str) -> None:
    flags, problems, _ = read(*words)
    assert problems == []
    with pytest.raises(ConfigError) as raised:
        named_models(flags)
    assert expected in "\n".join(map(str, raised.value.problems))


def test_all_wrong_models_are_told_at_once() -> None:
    flags, _, _ = read("--model_paths", '[1, [], ["a", 2]]', "--model_id_with_origin_paths", "a:b,c/d/e:f")
    with pytest.raises(ConfigError) as raised:
        named_models(flags)
    assert [problem.id for problem in raised.value.problems] == ["CFG-380"] * 3 + ["CFG-381"] * 2
