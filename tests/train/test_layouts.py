"""`mm train` through its flags on several layouts, one going on from the checkpoint of another."""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_runs import metrics, run, words

from mm.cli import train as train_command

LAYOUTS: list[dict[str, Any]] = [
    {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2,
        "use_multiparameter_pipeline_model_parallel": True, "optimization_level": 2,
        "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    },
    {
        "context_parallel_size": 4, "context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2,
        "use_cp_send_recv_overlap": True,
    },
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "layerzero": True},
    {"tensor_model_parallel_size": 2, "layerzero": True, "use_distributed_optimizer": True},
]  # fmt: skip


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def test_a_run_that_changes_its_layout_goes_on_as_if_nothing_had_happened(demo: Path, tmp_path: Path) -> None:
    zero = tmp_path / "zero_config.yaml"
    zero.write_text("zero3_size: 2\ntransformer_layers: [mm.wan.block.WanBlock]\nreduce_dtype: fp32\n")
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    commands = []
    for index, layout in enumerate(LAYOUTS):
        config = {"layerzero_config": zero} if "layerzero" in layout else {}
        commands.append(words(demo, tmp_path / "many", train_iters=2 * index + 2, **batch, **layout, **config))
    run_ranks(4, train_one_after_the_other, commands, timeout_s=240)
    single = run(demo, tmp_path / "single", train_iters=2 * len(LAYOUTS), **batch)
    many = metrics(tmp_path / "many")
    assert [row["step"] for row in many] == [row["step"] for row in single]
    for ours, theirs in zip(many, single, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert single[-1]["loss"] < single[0]["loss"]
