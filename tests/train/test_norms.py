"""Norms of parameters and gradients: of what is in the checkpoint, and the same however they are cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import metrics, run, words

from mm.checkpoint.weights import open_weights
from mm.cli import train as train_command

BATCH = {"micro_batch_size": 2, "global_batch_size": 4, "log_norms_interval": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "distributed optimizer": {"use_distributed_optimizer": True},
    "layer-zero": {"layerzero": True},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
}


def norms(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "norms.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("norms") / "run"
    run(demo, save, train_iters=2, **BATCH)
    return save


def test_they_are_those_of_the_checkpoint_and_of_the_step(single: Path) -> None:
    rows = norms(single)
    assert [row["step"] for row in rows] == [1, 2]
    source = open_weights(single / "iter_0000002")
    saved = {name: source.read(name) for name in rows[1]["weights"]}
    assert list(rows[1]["weights"]) == list(rows[1]["gradients"])
    assert rows[1]["weights"].keys() == source.shapes().keys()
    for name, norm in rows[1]["weights"].items():
        assert norm == pytest.approx(float(saved[name].double().norm()), rel=1e-6)
    for row, step in zip(rows, metrics(single), strict=True):
        whole = torch.tensor(list(row["gradients"].values()), dtype=torch.float64).norm()
        assert float(whole) == pytest.approx(step["grad_norm"], rel=1e-6)
    assert rows[0]["weights"] != rows[1]["weights"]
    board = EventAccumulator(str(single / "tensorboard"))
    board.Reload()
    name = "blocks.0.self_attn.q.weight"
    shown = [event.value for event in board.Scalars(f"norms/gradients/{name}")]
    assert shown == pytest.approx([row["gradients"][name] for row in rows])


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "which",
    [["distributed optimizer", "layer-zero"], ["tensor", "pipeline"]],
    ids=["replicas", "parts"],
)
def test_every_layout_tells_the_same(demo: Path, single: Path, tmp_path: Path, which: list[str]) -> None:
    (tmp_path / "zero.yaml").write_text("zero3_size: 2\n")
    commands = []
    for name in which:
        flags = dict(LAYOUTS[name])
        if flags.pop("layerzero", None):
            flags |= {"layerzero": True, "layerzero_config": tmp_path / "zero.yaml"}
        commands.append(words(demo, tmp_path / name, train_iters=2, **BATCH, **flags))
    run_ranks(2, train_one_after_the_other, commands, timeout_s=240)
    for name in which:
        for ours, theirs in zip(norms(tmp_path / name), norms(single), strict=True):
            for kind in ("gradients", "weights"):
                assert list(ours[kind]) == list(theirs[kind])
                # a bias of keys has no gradient but rounding's
                assert ours[kind] == pytest.approx(theirs[kind], rel=1e-4, abs=1e-7)
