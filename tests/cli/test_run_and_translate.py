"""`mm run` and `mm translate` at their command lines: what they print, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from mm.cli import run as run_command
from mm.cli import translate
from mm.errors import ConfigError

FLAGS = "--lr 1e-4 --train-iters 10 --load weights --bf16"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The words that name a model's and a data set's file."""
    predictor = {"hidden_size": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}
    (tmp_path / "m.json").write_text(json.dumps({"predictor": predictor, "diffusion": {"shift": 3.0}}))
    param = {
        "dataset_type": "t2v", "basic_parameters": {"data_path": "f.txt"},
        "preprocess_parameters": {"num_frames": 9, "max_height": 64, "max_width": 64},
    }  # fmt: skip
    (tmp_path / "d.json").write_text(json.dumps({"dataset_param": param}))
    return ["--mm-model", str(tmp_path / "m.json"), "--mm-data", str(tmp_path / "d.json")]


def refused(main: Any, words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        main(words)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    "program",
    [
        "mm train",
        "python pretrain_sora.py",
        "torchrun --nproc_per_node 8 pretrain_sora.py",
        "python -m mm.cli.train",
        "",
    ],
)
def test_a_command_is_printed_with_its_words(
    files: list[str], program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = program.split()
    translate.main(["--", *words, *files, *FLAGS.split()])
    text = capsys.readouterr().out
    assert "  lr: 0.0001  # --lr\n" in text and "  precision: bf16  # --bf16\n" in text
    assert f"  shift: 3.0  # diffusion.shift in {files[1]}\n" in text


def test_unknown_retired_and_missing_words_are_told_at_once(files: list[str]) -> None:
    wrong = ["--seq-length", "4096", "--use-torch-fsdp2", "--learning_rate", "1", "--lrr", "2"]
    told = refused(translate.main, ["--", "mm", "train", *files, *wrong])
    assert sorted(text[:7] for text in told) == [
        "CFG-004", "CFG-004", "CFG-007", "CFG-007", "CFG-008", "CFG-008", "CFG-023",
    ]  # fmt: skip
    assert any("--learning_rate is not a flag; the one for that here is --lr" in text for text in told)


def test_rules_are_asked(files: list[str]) -> None:
    (told,) = refused(translate.main, ["--", "mm", "train", *files, *FLAGS.split(), "--save-interval", "2"])
    assert told.startswith("CFG-024")


def test_two_systems_in_one_command_are_refused_by_name(files: list[str]) -> None:
    words = ["--dataset_base_path", "data", "--model_paths", "x", "--video_sample_size", "256", "--sede", "1"]
    told = refused(translate.main, ["--", "mm", "train", *files, *FLAGS.split(), *words])
    assert [text[:7] for text in told] == ["CFG-190", "CFG-007"]
    for part in ("MindSpeed-MM (--mm-model, --mm-data)", "DiffSynth-Studio (--dataset_base_path, --model_paths)"):
        assert part in told[0]
    assert "VideoX-Fun (--video_sample_size)" in told[0] and "--sede" in told[1]


@pytest.mark.parametrize("words", [[], ["--"], ["--", "mm", "plot", "--run", "x"], ["ls"]])
def test_no_command_of_training(words: list[str]) -> None:
    (told,) = refused(translate.main, words)
    assert told.startswith("CFG-191") and "pretrain_sora.py" in told


@pytest.mark.parametrize(
    ("words", "id", "told"),
    [
        ([], "CFG-006", "0 are given"),
        (["a.yaml", "b.yaml"], "CFG-006", "2 are given"),
        (["a.yaml", "--lr", "1e-4"], "CFG-190", "Write optimizer.lr into the file"),
        (["--mm-data=x", "a.yaml"], "CFG-190", "--mm-data is a word of another command line"),
    ],
)
def test_a_run_is_one_file(words: list[str], id: str, told: str) -> None:
    (text,) = refused(run_command.main, words)
    assert text.startswith(id) and told in text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (text,) = refused(run_command.main, [str(tmp_path / "none.yaml")])
    assert text.startswith("CFG-001")


@pytest.mark.parametrize(
    ("change", "id", "told"),
    [
        ("optimizer: {lr: 1.0, min_lr: 2.0}", "CFG-025", "optimizer.min_lr 2.0 is above optimizer.lr 1.0"),
        ("parallel: {sequence_parallel: true}", "CFG-037", "parallel.sequence_parallel true has no effect with"),
        ("parallel: {pipeline_size: 2}", "CFG-032", "1 processes do not divide"),
        ("checkpoint: {load: w, save_interval: 2}", "CFG-024", "checkpoint.save_interval has no effect without"),
        ("checkpoint: {load: w, save: s, format: torch}", "CFG-115", "checkpoint.save_optimizer is true"),
        ("memory: {offload: true}", "CFG-048", "memory.offload in RUN has no effect"),
        ("data: {features: {path: f.txt, clip: {num_frames: 8, height: 64, width: 60}}}", "CFG-050 CFG-051",
         "RUN: data.features.clip.num_frames is 8"),
        ("data: {features: {path: f.jsonl, clip: {num_frames: 9, height: 64, width: 64}}}", "CFG-053",
         "data.features.folder is missing"),
        ("data: {features: {path: f.txt, clip: {num_frames: 9, height: 64, width: 64}}, on_bad_sample: skip}",
         "CFG-110", 'data.on_bad_sample is "skip"'),
        ("model: {shape: {hidden_size: 48, ffn_dim: 64, num_heads: 4, num_layers: 4}}\nparallel: {tensor_size: 3}",
         "CFG-032 CFG-033", "model.shape.num_heads 4 and model.shape.ffn_dim 64 in RUN do not divide by"),
    ],
)  # fmt: skip
def test_rules_speak_of_the_file(tmp_path: Path, change: str, id: str, told: str) -> None:
    """The same rules as for flags, with the file's own keys and no flag in sight."""
    parts = {
        "training": "training: {steps: 10}",
        "model": "model: {shape: {hidden_size: 48, ffn_dim: 64, num_heads: 4, num_layers: 4}}",
        "data": "data: {features: {path: f.txt, clip: {num_frames: 9, height: 64, width: 64}}}",
        "optimizer": "optimizer: {lr: 1e-4}",
        "checkpoint": "checkpoint: {load: w}",
    }
    parts |= {line.partition(":")[0]: line for line in change.splitlines()}
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(parts.values()))
    found = refused(run_command.main, [str(path)])
    assert [text[:7] for text in found] == id.split()
    assert any(told.replace("RUN", str(path)) in text for text in found), found
    assert not any("--" in text for text in found), found
