"""`mm train --pack`: images, short and long clips in sequences of a token budget, against the same one by one."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_store import LONGEST, write_mixed
from ranks import run_ranks
from training_runs import WEIGHTS, bits, metrics, run, words

from mm.checkpoint.weights import open_weights
from mm.cli import train as train_command
from mm.errors import ConfigError, DataError

BATCH = {"micro_batch_size": 1, "global_batch_size": 8}
STEPS = 4
BUDGET = 100
EXACT = {"lr": 1e-2, "adam_eps": 1e-2, "clip_grad": 0.3}
"""A small epsilon would turn the rounding of gradients near zero into steps as large as any."""
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "cp2": {"context_parallel_size": 2},
    "ring2": {
        "context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo", "recompute_granularity": "selective",
        "mm_model": "offloading.json",
    },
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": PIPELINE,
    "pp2vp2": {**PIPELINE, "virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full",
               "recompute_method": "uniform"},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixed(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Flags that name the features of all kinds."""
    folder = tmp_path_factory.mktemp("mixed")
    files = {"mm_data": write_mixed(demo, folder), "mm_model": demo / "configs" / "pretrain_model.json"}
    return {**files, **EXACT, **BATCH}


@pytest.fixture(scope="module")
def plain(demo: Path, mixed: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run of one process that packs nothing."""
    folder = tmp_path_factory.mktemp("plain")
    run(demo, folder, **mixed, train_iters=STEPS, save_interval=1)
    return folder


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    source = open_weights(folder / f"iter_{step:07d}")
    return {name: source.read(name) for name in source.shapes()}


def require_equal(packed: Path, plain: Path) -> None:
    """The same losses and gradient norms, and weights that differ by little of what they have moved."""
    for ours, theirs in zip(metrics(packed), metrics(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["consumed_samples"] == theirs["consumed_samples"]
    first, last = weights(plain, 1), weights(plain)
    moved = max(float((last[name] - first[name]).abs().max()) for name in first)
    assert moved > 1e-3
    ours = weights(packed)
    assert ours.keys() == last.keys()
    assert max(float((ours[name] - last[name]).abs().max()) for name in last) < 1e-4 * moved


def test_a_packed_run_is_the_run_without(
    demo: Path, mixed: dict[str, Any], plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(demo, tmp_path, **mixed, train_iters=STEPS, pack=BUDGET, num_workers=1)
    require_equal(tmp_path, plain)
    assert "8 = 8 samples x 1 replicas, in about 3 sequences of at most 100 tokens on each (predicted)" in caplog.text


def run_all(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def test_every_layout_trains_the_samples_of_the_run_without(
    demo: Path, mixed: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["predictor"]["attention_async_offload"] = True
    (tmp_path / "offloading.json").write_text(json.dumps(content))
    commands = []
    for name, layout in LAYOUTS.items():
        flags = {**mixed, **layout, **({"mm_model": tmp_path / layout["mm_model"]} if "mm_model" in layout else {})}
        commands.append(words(demo, tmp_path / name, **flags, train_iters=STEPS, pack=BUDGET))
    run_ranks(2, run_all, commands, timeout_s=240)
    for name in LAYOUTS:
        require_equal(tmp_path / name, plain)


@pytest.mark.nightly
def test_packs_with_images_adapters_and_layerzero(
    demo_of_images: Path, mixed: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    """Of one size, so that a sequence has two clips; each sample with its own images."""
    adapters = {"load": None, "load_base_model": demo_of_images / WEIGHTS, "lora_r": 4, "lora_alpha": 8.0}
    configs = demo_of_images / "configs" / "i2v"
    images = {"mm_data": configs / "feature_data.json", "mm_model": configs / "pretrain_model.json"}
    sizes = {**EXACT, **BATCH, "train_iters": STEPS}
    runs: dict[str, dict[str, Any]] = {
        "adapters": {**mixed, **adapters, "lora_target_modules": ["q", "v", "o"]},
        "images": {**images, "load": None, "init_from_scratch": True},
    }
    for name, flags in runs.items():
        alone, packed = (
            run(demo_of_images, tmp_path / f"{name}{budget}", **{**flags, **sizes}, pack=budget)
            for budget in (None, BUDGET)
        )
        for ours, theirs in zip(packed, alone, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    zero = tmp_path / "zero_config.yaml"
    zero.write_text("zero3_size: 2\ntransformer_layers: [mm.wan.block.WanBlock]\nreduce_dtype: fp32\n")
    flags = {**mixed, "layerzero": True, "layerzero_config": zero, "train_iters": STEPS, "pack": BUDGET}
    run_ranks(2, run_all, [words(demo_of_images, tmp_path / "zero", **flags)], timeout_s=240)
    require_equal(tmp_path / "zero", plain)


@pytest.mark.nightly
def test_a_packed_run_goes_on_bit_for_bit_and_packing_may_begin_or_end(
    demo: Path, mixed: dict[str, Any], plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(demo, tmp_path / "whole", **mixed, train_iters=STEPS, pack=BUDGET)
    for stop in (1, 3):
        run(demo, tmp_path / f"{stop}", **mixed, train_iters=stop, pack=BUDGET)
        assert bits(run(demo, tmp_path / f"{stop}", **mixed, train_iters=STEPS, pack=BUDGET)) == bits(whole)
    assert "--pack was" not in caplog.text
    for before, after, said in (
        ({}, {"pack": BUDGET}, f"--pack was absent and is {BUDGET}"),
        ({"pack": BUDGET}, {"pack": LONGEST}, f"--pack was {BUDGET} and is {LONGEST}"),
        ({"pack": BUDGET}, {}, f"--pack was {BUDGET} and is absent"),
    ):
        folder = tmp_path / said.replace(" ", "")
        run(demo, folder, **mixed, train_iters=2, **before)
        run(demo, folder, **mixed, train_iters=STEPS, **after)
        require_equal(folder, plain)
        assert said in caplog.text


def test_tokens_of_all_replicas_are_counted(demo: Path, mixed: dict[str, Any], tmp_path: Path) -> None:
    """Two epochs in three steps: twice 12 samples of 164 / 6 tokens in the mean."""
    commands = [words(demo, tmp_path / name, **mixed, train_iters=3, **flags) for name, flags in PACKED_OR_NOT.items()]
    run_ranks(2, run_all, commands)
    for name in PACKED_OR_NOT:
        assert sum(row["tokens_per_s"] * row["step_time_s"] for row in metrics(tmp_path / name)) == pytest.approx(656)


PACKED_OR_NOT: dict[str, dict[str, Any]] = {"packed": {"pack": BUDGET}, "plain": {}}


@pytest.mark.parametrize(
    ("flags", "error", "told"),
    [
        ({"pack": 60}, DataError, r"DATA-077: 2 samples with latents \[16, 5, 8, 8\] have 80 tokens each, and --pack"),
        ({"pack": 40}, ConfigError, r"CFG-207: A clip of --mm-data has 48 tokens, more than --pack 40\. .* least 48"),
        ({"micro_batch_size": 2}, ConfigError, "CFG-206: --micro-batch-size 2 has no effect with --pack 100: .* 1; --"),
        ({"compile_blocks": True}, ConfigError, "CFG-206: --compile-blocks compiles a block for few lengths"),
        ({"mixture": 2}, ConfigError, "CFG-206: micro_batch_size in mixture in .* has no effect with --pack 100"),
        ({"pack": 0}, ConfigError, 'CFG-005: --pack is "0"'),
        ({"on_bad_sample": "skip:max=1%"}, ConfigError, "CFG-206: --on-bad-sample skip.* shuffle false"),
    ],
)  # fmt: skip
def test_refusals(
    demo: Path, mixed: dict[str, Any], tmp_path: Path, flags: dict[str, Any], error: type, told: str
) -> None:
    content = json.loads(Path(mixed["mm_data"]).read_text())
    content["dataloader_param"] = {"shuffle": "on_bad_sample" not in flags}
    if size := flags.get("mixture"):
        store = content["dataset_param"]["basic_parameters"]["data_folder"]
        content["dataloader_param"]["mixture"] = {"shares": [{"folder": store, "micro_batch_size": size}]}
    (tmp_path / "data.json").write_text(json.dumps(content))
    given = {**mixed, "mm_data": tmp_path / "data.json", "pack": BUDGET, **flags, "mixture": None}
    with pytest.raises(error, match=told):
        run(demo, tmp_path / "run", **given, train_iters=1)
    assert not list(tmp_path.glob("run/iter_*"))
