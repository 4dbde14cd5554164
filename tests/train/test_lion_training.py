"""`--optimizer lion`: gone on with bit for bit on every layout, recorded, refused where another optimizer was meant."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_ranks
from training_runs import bits, metrics, run, words

from mm.checkpoint.store import read_manifest, read_tensor
from mm.cli import run as run_command
from mm.cli import train as train_command
from mm.config.run.file import load_training
from mm.errors import CheckpointError, ConfigError

STEPS = 4
FLAGS: dict[str, Any] = {"optimizer": "lion", "lr": 3e-4, "micro_batch_size": 2, "global_batch_size": 4}
LORA = {"load": None, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q", "ffn.0"]}
ROWS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "distopt, bf16": {"use_distributed_optimizer": True, "bf16": True},
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2, "async_save": True},
    "zero2": {"layerzero": True},
    "zero2, average": {"layerzero": True, "use_distributed_optimizer": True, "ema_decay": 0.9},
    "lora, pp2": {**LORA, "pipeline_model_parallel_size": 2},
    "lora, tp2": {**LORA, "tensor_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def single(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process, with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run(demo, folder, train_iters=STEPS, save_interval=1, **FLAGS)
    return folder


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / f"iter_{step:07d}"
    manifest = read_manifest(path)
    return {key: read_tensor(path, manifest, key) for key in manifest.tensors}


def test_a_checkpoint_has_one_average_and_says_whose(single: Path) -> None:
    found, scalars = state(single, STEPS), read_manifest(single / f"iter_{STEPS:07d}").scalars
    names = {key.removeprefix("model.") for key in found if key.startswith("model.")}
    assert found.keys() == {f"{kind}{name}" for kind in ("model.", "optimizer.exp_avg.") for name in names}
    assert all(float(found[f"optimizer.exp_avg.{name}"].abs().max()) > 0 for name in names)
    recorded = {"optimizer": "lion", "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.01, "clip_grad": 1.0}
    assert scalars["steps"]["optimizer"] == recorded
    assert "adam_step" not in scalars and scalars["optimizer_state"] is True


def test_every_weight_moves_by_the_rate(demo: Path, single: Path) -> None:
    """In one step by the learning rate exactly, or not at all, and by its share of decay (Chen et al., algorithm 2)."""
    one, two = (state(single, step) for step in (1, 2))
    for key, before in one.items():
        if key.startswith("model."):
            decayed = before.dim() > 1 and not key.endswith(".bias")
            moved = (two[key].double() - before.double() * (1 - 3e-4 * 0.01 * decayed)).abs()
            rounding = 2e-7 * float(before.abs().max())
            assert bool(((moved - 3e-4).abs() < rounding + 1e-9).logical_or(moved < rounding).all()), key


def test_adamw_is_recorded_as_it_always_was(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=1)
    scalars = read_manifest(tmp_path / "iter_0000001").scalars
    assert list(scalars["steps"]["optimizer"].items()) == [
        ("weight_decay", 0.01), ("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_eps", 1e-8), ("clip_grad", 1.0),
    ]  # fmt: skip
    assert scalars["adam_step"] == 1 and "optimizer_state" not in scalars


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(demo: Path, single: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=2, **FLAGS)
    assert bits(run(demo, tmp_path, train_iters=STEPS, **FLAGS)) == bits(metrics(single))
    shard = f"iter_{STEPS:07d}/shard-00000-of-00001.safetensors"
    assert (tmp_path / shard).read_bytes() == (single / shard).read_bytes()


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


@pytest.mark.nightly
def test_on_every_layout(demo: Path, single: Path, tmp_path: Path, model_json: Path) -> None:
    """Straight, and stopped in the middle, on two processes; then the end of each is gone on with by one process."""
    (tmp_path / "zero.yaml").write_text("zero3_size: 2\n")
    commands, flags = [], {}
    for name in ROWS:
        row = {**FLAGS, "mm_model": model_json, **ROWS[name]}
        row |= {"layerzero_config": tmp_path / "zero.yaml"} if "layerzero" in row else {}
        row |= {"load_base_model": single} if "lora_r" in row else {}
        flags[name] = row
        commands.append(words(demo, tmp_path / name / "straight", train_iters=STEPS, **row))
        commands += [words(demo, tmp_path / name / "stopped", train_iters=steps, **row) for steps in (2, STEPS)]
    run_ranks(2, train_one_after_the_other, commands, timeout_s=400)
    axes = ("tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size")
    layout = {*axes, "layerzero", "layerzero_config", "use_distributed_optimizer"}
    for name in ROWS:
        straight, stopped = (tmp_path / name / which for which in ("straight", "stopped"))
        assert bits(metrics(stopped)) == bits(metrics(straight)), name
        one, other = state(straight, STEPS), state(stopped, STEPS)
        assert one.keys() == other.keys() and all(torch.equal(other[key], value) for key, value in one.items()), name
        alone = {key: value for key, value in flags[name].items() if key not in layout}
        rows = run(demo, stopped, train_iters=STEPS + 1, **alone)
        assert rows[-1]["step"] == STEPS + 1, name
        if name not in ("distopt, bf16", *(row for row in ROWS if "lora" in row)):
            assert [row["loss"] for row in rows[:STEPS]] == pytest.approx(
                [row["loss"] for row in metrics(single)], rel=1e-3
            ), name


def test_another_optimizer_is_refused(demo: Path, single: Path, tmp_path: Path) -> None:
    """Both ways; on purpose it starts anew, as no state of the one is the other's."""
    adamw = {**FLAGS, "optimizer": "adamw"}
    run(demo, tmp_path, train_iters=1, **FLAGS)
    with pytest.raises(ConfigError) as caught:
        run(demo, tmp_path, train_iters=2, **adamw)
    (problem,) = caught.value.problems
    assert problem.id == "CFG-160" and "--optimizer was lion and is adamw" in problem.message
    assert "Give --optimizer lion to go on as before" in problem.remedy
    assert problem.remedy.endswith("add --resume-changed optimizer and --no-load-optim.")
    with pytest.raises(CheckpointError, match=r"CKPT-073.*the state of Lion.*--optimizer is adamw"):
        run(demo, tmp_path, train_iters=2, resume_changed=["optimizer"], **adamw)
    run(demo, tmp_path, train_iters=2, resume_changed=["optimizer"], no_load_optim=True, **adamw)
    with pytest.raises(ConfigError, match=r"CFG-160.*--optimizer was adamw and is lion"):
        run(demo, tmp_path, train_iters=3, **FLAGS)
    with pytest.raises(CheckpointError, match=r"CKPT-073.*the state of AdamW.*--optimizer is lion"):
        run(demo, tmp_path, train_iters=3, resume_changed=["optimizer"], **FLAGS)
    assert len(run(demo, tmp_path, train_iters=3, resume_changed=["optimizer"], no_load_optim=True, **FLAGS)) == 3


def test_a_checkpoint_without_its_state(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=1, no_save_optim=True, **FLAGS)
    with pytest.raises(CheckpointError, match=r"CKPT-072.*start Lion anew"):
        run(demo, tmp_path, train_iters=2, **FLAGS)
    assert len(run(demo, tmp_path, train_iters=2, no_load_optim=True, **FLAGS)) == 2


def test_a_number_that_it_does_not_have(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"CFG-029.*--adam-eps has no effect with --optimizer lion"):
        run(demo, tmp_path, train_iters=1, adam_eps=1e-8, **FLAGS)
    with pytest.raises(ConfigError, match=r"CFG-005.*--optimizer"):
        run(demo, tmp_path, train_iters=1, optimizer="sgd")


def test_its_file(demo: Path, tmp_path: Path) -> None:
    """run.yaml names it with its own numbers, is gone on with, and is told of in its own words."""
    run(demo, tmp_path, train_iters=1, **FLAGS)
    file = tmp_path / "run.yaml"
    written = load_training(file).optimizer
    assert (written.name, written.beta1, written.beta2, written.eps) == ("lion", 0.9, 0.99, None)
    values = yaml.safe_load(file.read_text())
    values["training"]["steps"] = 2

    def go_on(**changed: Any) -> str:
        file.write_text(yaml.safe_dump({**values, "optimizer": {**values["optimizer"], **changed}}))
        try:
            run_command.main([str(file)])
        except ConfigError as error:
            (problem,) = error.problems
            return str(problem)
        return ""

    found = go_on(eps=1e-8)
    assert "CFG-029" in found and "optimizer.eps has no effect with optimizer.name lion" in found
    found = go_on(name="adamw")
    assert "CFG-160" in found and "optimizer.name was lion and is adamw" in found and "--" not in found
    assert "checkpoint.resume_changed optimizer and checkpoint.load_optimizer false" in found
    assert go_on() == "" and [row["step"] for row in metrics(tmp_path)] == [1, 2]
