"""`mm run`: a run as a file is the run of the flags, bit for bit, and goes on from the file beside its checkpoints."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_ranks
from training_runs import WEIGHTS, bits, metrics, run, words

from mm.cli import run as run_command
from mm.cli import translate as translate_command
from mm.config.run.file import load_training
from mm.errors import CheckpointError, ConfigError, MMError

ROOT = Path(__file__).parents[2]
HYBRID = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "use_distributed_optimizer": True,
    "micro_batch_size": 2,
    "global_batch_size": 8,
}


def translated(command: list[str], capsys: pytest.CaptureFixture[str], path: Path, world_size: int = 1) -> Path:
    """The file that `mm translate` prints of a command."""
    capsys.readouterr()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    try:
        translate_command.main(["--", "mm", "train", *command])
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
    path.write_text(capsys.readouterr().out)
    return path


def test_a_translated_command_trains_the_same_bits(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "train_iters": 3, "lr": 3e-4, "lr_decay_style": "cosine", "lr_warmup_iters": 1, "min_lr": 1e-5, "seed": 7,
        "recompute_granularity": "selective", "weight_decay": 0.1, "clip_grad": 0.5, "ema_decay": 0.9,
    }  # fmt: skip
    of_flags = run(demo, tmp_path / "flags", **options)
    path = translated(words(demo, tmp_path / "file", **options), capsys, tmp_path / "run.yaml")
    run_command.main([str(path)])
    assert bits(metrics(tmp_path / "file")) == bits(of_flags) and len(of_flags) == 3


@pytest.mark.nightly
def test_four_processes_train_the_same_bits(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mm.cli import train as train_command

    command = words(demo, tmp_path / "flags", train_iters=2, **HYBRID)
    run_ranks(4, train_command.main, command)
    other = words(demo, tmp_path / "file", train_iters=2, **HYBRID)
    run_ranks(4, run_command.main, [str(translated(other, capsys, tmp_path / "run.yaml", 4))])
    assert bits(metrics(tmp_path / "file")) == bits(metrics(tmp_path / "flags"))


def test_a_run_goes_on_from_the_file_beside_its_checkpoints(demo: Path, tmp_path: Path) -> None:
    whole = run(demo, tmp_path / "whole", train_iters=4, save_interval=2)
    run(demo, tmp_path / "parts", train_iters=2, lr_decay_iters=4)
    file = tmp_path / "parts" / "run.yaml"
    written = load_training(file)
    assert (written.data.global_batch_size, written.optimizer.lr, written.checkpoint.load) == (
        4, 1e-3, str(demo / WEIGHTS),
    )  # fmt: skip
    run_command.main([str(file)])  # at its end already
    assert len(metrics(tmp_path / "parts")) == 2
    values = yaml.safe_load(file.read_text())
    values["training"]["steps"] = 4
    file.write_text(yaml.safe_dump(values))
    run_command.main([str(file)])
    assert bits(metrics(tmp_path / "parts")) == bits(whole)


def test_what_a_resumed_file_changes_is_told_in_its_words(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "run", train_iters=2)
    file = tmp_path / "run" / "run.yaml"
    values = yaml.safe_load(file.read_text())
    values["training"]["steps"], values["optimizer"]["weight_decay"] = 4, 0.5
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        run_command.main([str(file)])
    (problem,) = caught.value.problems
    assert problem.id == "CFG-160" and "optimizer.weight_decay was 0.01 and is 0.5" in problem.message
    assert "--" not in problem.message + problem.remedy
    assert "checkpoint.resume_changed optimizer" in problem.remedy
    assert yaml.safe_load(file.read_text()) == values  # a refused run leaves it alone


@pytest.fixture(scope="module")
def one_step(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that may be gone on with, and is only refused here."""
    home = tmp_path_factory.mktemp("one_step")
    run(demo, home / "run", train_iters=1)
    return home / "run"


ADAPTERS = {"rank": 2, "alpha": 2.0, "targets": ["q"]}
LION = {"name": "lion", "beta1": None, "beta2": None, "eps": None}


@pytest.mark.parametrize(
    ("section", "change", "id", "told"),
    [
        ("optimizer", LION, "CKPT-073", "give optimizer.name adamw, or checkpoint.load_optimizer false"),
        ("training", {"seed": 9}, "CKPT-071", "with training.seed 1234, and training.seed is 9"),
        ("optimizer", {"ema_decay": 0.9}, "CKPT-085", "and optimizer.ema_decay is 0.9"),
        ("checkpoint", {"format": "torch", "save_optimizer": False}, "CKPT-050", "of checkpoint.format torch_dist"),
        ("adapters", ADAPTERS, "CKPT-081", "give it to adapters.base if"),
    ],
)
def test_what_a_checkpoint_lacks_is_told_in_the_file_s_words(
    demo: Path, one_step: Path, tmp_path: Path, section: str, change: dict[str, Any], id: str, told: str
) -> None:
    values = yaml.safe_load((one_step / "run.yaml").read_text())
    values["training"]["steps"] = 2
    values["checkpoint"] |= {"resume_changed": ["optimizer", "average", "schedule"], "load": None, "from_scratch": True}
    values[section] = (values[section] or {}) | change
    if section == "adapters":
        values["adapters"]["base"], values["checkpoint"]["from_scratch"] = str(demo / WEIGHTS), False
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(MMError) as caught:
        run_command.main([str(file)])
    (problem,) = caught.value.problems
    said = f"{problem.message} {problem.remedy}".replace("Give ", "give ")
    assert problem.id == id and told in said, said
    assert "--" not in said, said


def test_the_example_runs_on_the_embedded_default(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "demo"
    place.mkdir()
    for name in ("configs", "weights", "features"):
        (place / name).symlink_to(demo / name)
    monkeypatch.chdir(tmp_path)
    run_command.main([str(ROOT / "examples" / "run.yaml")])
    assert [row["step"] for row in metrics(place / "run")] == [1, 2, 3, 4]


def test_a_disk_that_refuses_the_file_ends_the_run(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "run.yaml").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="CKPT-031"):
        run(demo, tmp_path / "run", train_iters=1)
    assert shlex.join(sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".tmp"))) == ""
