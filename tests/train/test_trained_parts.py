"""`mm train --trainable-modules`: saving, going on, adapters beside it, averages, memory, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import bits, metrics, run, run_on, words

from mm.checkpoint.store import read_manifest, read_tensor
from mm.checkpoint.weights import WeightSource, open_weights
from mm.cli import convert as convert_command
from mm.cli import train as train_command
from mm.config.layout import Layout
from mm.config.model import PUBLISHED
from mm.dialects.mindspeed.training import read_training
from mm.doctor.dry_run import DryRunJob, dry_run
from mm.errors import MMError
from mm.lora.convert import merged
from mm.lora.record import PARTS_FILE
from mm.parallel.apply import DataParallelOptions
from mm.train.memory_advice import freed_bytes
from mm.train.memory_breakdown import MemoryBreakdown
from mm.train.trained_parts import trained_model
from mm.wan.model import whole_shapes
from mm.wan.precision import keep_fp32

PARTS = {"trainable_modules": ["self_attn", "ffn:0.5"]}
LORA = {"load": None, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q", "v"]}
BESIDE = {**LORA, "trainable_modules": ["^head.", "ffn.2:0.5"]}


def is_trained(name: str) -> bool:
    return ".self_attn." in name or ".ffn." in name


def is_beside(name: str) -> bool:
    return name.startswith("head.") or ".ffn.2." in name


@pytest.fixture
def bf16(demo: Path, tmp_path: Path) -> dict[str, Any]:
    """Flags of a bf16 run with the optimizer's state sharded."""
    content = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    content["predictor"]["dtype"] = "bf16"
    (tmp_path / "bf16.json").write_text(json.dumps(content))
    return {"bf16": True, "mm_model": tmp_path / "bf16.json", "use_distributed_optimizer": True}


def in_run(source: WeightSource, name: str) -> torch.Tensor:
    """A weight in the dtype that a bf16 run has it in."""
    value = source.read(name)
    return value.float() if keep_fp32(name) else value.bfloat16()


def shard_of(folder: Path) -> bytes:
    return (folder / "shard-00000-of-00001.safetensors").read_bytes()


def test_four_steps_are_two_and_two_and_what_is_frozen_keeps_every_bit(
    demo: Path, base: Path, tmp_path: Path, bf16: dict[str, Any]
) -> None:
    flags = {**bf16, **PARTS, "load": base, "lr_decay_style": "cosine", "lr_decay_iters": 4}
    straight = run(demo, tmp_path / "straight", train_iters=4, **flags)
    run(demo, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(demo, tmp_path / "stopped", train_iters=4, **flags)) == bits(straight)
    folders = [tmp_path / name / "iter_0000004" for name in ("straight", "stopped")]
    assert shard_of(folders[0]) == shard_of(folders[1])
    assert [row["lr"] for row in straight] == pytest.approx([5e-4 * (1 + math.cos(math.pi * s / 4)) for s in range(4)])
    manifest, source = read_manifest(folders[0]), open_weights(base)
    names = list(source.shapes())
    kept = [name for name in names if is_trained(name)]
    states = {f"optimizer.{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in kept}
    assert set(manifest.tensors) == {f"model.{name}" for name in names} | states
    for name in names:
        saved = read_tensor(folders[0], manifest, f"model.{name}")
        if is_trained(name):
            assert saved.dtype == torch.float32 and not torch.equal(saved, source.read(name).float()), name
        else:
            assert torch.equal(saved, in_run(source, name)) and saved.dtype == in_run(source, name).dtype, name


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("row", "limit"),
    [
        ({"use_distributed_optimizer": True, "overlap_grad_reduce": True}, 1e-6),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 1e-5),
        ({"pipeline_model_parallel_size": 2}, 1e-6),
        ({"pipeline_model_parallel_size": 2, "trainable_modules": ["^blocks.3.", "^head.:0.5"]}, 1e-6),
        ({"context_parallel_size": 2}, 1e-6),
        ({"layerzero": True}, 1e-6),
    ],
    ids=["dp2-distopt", "tp2-sp", "pp2", "pp2-nothing-on-the-first", "cp2", "zero2"],
)
def test_layouts_equal_one_process(demo: Path, base: Path, tmp_path: Path, row: dict[str, Any], limit: float) -> None:
    (tmp_path / "zero.yaml").write_text("zero3_size: 2\n")
    batch = {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 3, "load": base}
    chosen = {"trainable_modules": row.get("trainable_modules", PARTS["trainable_modules"])}
    alone = run(demo, tmp_path / "one", **batch, **chosen)
    more = {"layerzero_config": tmp_path / "zero.yaml"} if "layerzero" in row else {}
    together = run_on(2, demo, tmp_path / "two", **batch, **{**chosen, **row, **more})
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in together] == pytest.approx([r[name] for r in alone], rel=limit), name


@pytest.mark.nightly
def test_a_run_goes_on_in_another_layout_and_precision(
    demo: Path, base: Path, tmp_path: Path, bf16: dict[str, Any]
) -> None:
    (tmp_path / "zero.yaml").write_text("zero3_size: 2\n")
    flags = {**PARTS, "load": base, "micro_batch_size": 2, "global_batch_size": 4, "save_interval": 1}
    straight = run(demo, tmp_path / "one", **flags, train_iters=3)
    run_on(2, demo, tmp_path / "many", **flags, train_iters=1, pipeline_model_parallel_size=2)
    zero = {"layerzero": True, "layerzero_config": tmp_path / "zero.yaml"}
    run_on(2, demo, tmp_path / "many", **flags, train_iters=2, **zero)
    run(demo, tmp_path / "many", **flags, train_iters=3)
    assert [r["loss"] for r in metrics(tmp_path / "many")] == pytest.approx([r["loss"] for r in straight], rel=1e-6)
    run(demo, tmp_path / "many", **{**flags, **bf16}, train_iters=4, resume_changed=["precision"])
    run_on(2, demo, tmp_path / "many", **{**flags, **bf16, **zero}, train_iters=5)
    run(demo, tmp_path / "many", **flags, train_iters=6, resume_changed=["precision"])
    source = open_weights(base)
    for step, precise in ((5, False), (6, True)):
        folder = tmp_path / "many" / f"iter_000000{step}"
        manifest = read_manifest(folder)
        for name in source.shapes():
            saved, frozen = read_tensor(folder, manifest, f"model.{name}"), in_run(source, name)
            if is_trained(name):
                assert saved.dtype == torch.float32 and not torch.equal(saved, saved.bfloat16().float()), name
            else:
                assert torch.equal(saved, frozen.float() if precise else frozen), name


def test_parts_beside_adapters_are_saved_resumed_and_merged(
    demo: Path, base: Path, tmp_path: Path, bf16: dict[str, Any]
) -> None:
    flags = {**bf16, **BESIDE, "load_base_model": base}
    straight = run(demo, tmp_path / "straight", train_iters=3, **flags)
    run(demo, tmp_path / "stopped", train_iters=2, **flags)
    assert bits(run(demo, tmp_path / "stopped", train_iters=3, **flags)) == bits(straight)
    folder, source = tmp_path / "straight" / "iter_0000003", open_weights(base)
    assert shard_of(folder) == shard_of(tmp_path / "stopped" / "iter_0000003")
    manifest = read_manifest(folder)
    own = [key for key in manifest.tensors if key.startswith("model.") and ".lora_" not in key]
    parts = [name for name in source.shapes() if is_beside(name)]
    assert sorted(own) == sorted(f"model.{name}" for name in parts)
    beside = load_file(folder / PARTS_FILE)
    assert beside.keys() == set(parts)
    together, half = merged(base, tmp_path / "straight"), merged(base, tmp_path / "straight", 0.5)
    for name in parts:
        value, before = read_tensor(folder, manifest, f"model.{name}"), source.read(name)
        assert value.dtype == torch.float32 and not torch.equal(value, before.float()), name
        assert torch.equal(beside[name], value), name
        torch.testing.assert_close(together.read(name), value.to(before.dtype), rtol=0, atol=0)
        torch.testing.assert_close(half.read(name), torch.lerp(before.float(), value, 0.5).to(before.dtype))
    out = tmp_path / "out" / "lora.safetensors"
    convert_command.main(["--mode", "lora_to_comfyui", "--source_path", str(folder), "--target_path", str(out)])
    assert load_file(out.with_name("lora.parts.safetensors")).keys() == set(parts)
    more = {**flags, "load": tmp_path / "straight", "finetune": True}
    run(demo, tmp_path / "on", train_iters=1, **more)
    run(demo, tmp_path / "file", train_iters=1, **{**more, "load": out, "finetune": None})
    run(demo, tmp_path / "new", train_iters=1, **flags)
    of_base = {name: source.read(name) for name in parts}
    for place, start in (("on", beside), ("file", of_base), ("new", of_base)):
        there = tmp_path / place / "iter_0000001"
        for name in parts:
            # fp32 masters start as they are stored, whatever the run's precision: AdamW's first step moves by the rate
            moved = read_tensor(there, read_manifest(there), f"model.{name}") - start[name].float()
            rate = 1e-3 if name.startswith("head.") else 5e-4
            assert float(moved.abs().max()) == pytest.approx(rate, rel=2e-2), (place, name)


@pytest.mark.nightly
def test_the_average_of_a_run_of_parts_is_a_whole_model(demo: Path, base: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "run", train_iters=3, load=base, ema_decay=0.5, **PARTS)
    folder, source = tmp_path / "run" / "iter_0000003", open_weights(base)
    averaged, plain = open_weights(folder, averaged=True), open_weights(folder)
    assert averaged.shapes() == plain.shapes() == source.shapes()
    for name in source.shapes():
        same = torch.equal(averaged.read(name), plain.read(name))
        assert same != is_trained(name), name
        assert torch.equal(plain.read(name), source.read(name).float()) != is_trained(name), name


REFUSED: list[tuple[Callable[[Path], dict[str, Any]], list[str], str]] = [
    (lambda base: {"trainable_modules": ["selfattn"]}, ["CFG-420"], "Did you mean self_attn"),
    (lambda base: {"trainable_modules": ["^attn"]}, ["CFG-420"], "Names begin with patch_embedding"),
    (lambda base: {"trainable_modules": ["blocks", "ffn:0.5", "head_"]}, ["CFG-421", "CFG-420"], "'blocks', before it"),
    (lambda base: {"trainable_modules": ["ffn:0"]}, ["CFG-005"], "factor above 0"),
    (lambda base: {"trainable_modules": ["ffn:fast"]}, ["CFG-005"], "factor above 0"),
    (lambda base: {**BESIDE, "load_base_model": base, "trainable_modules": ["self_attn.q"]}, ["CFG-422"], "4 linears"),
    (
        lambda base: {**BESIDE, "load_base_model": base, "lora_base_dtype": "int8", "trainable_modules": ["ffn"]},
        ["CFG-424"],
        "8 linears",
    ),
]


@pytest.mark.parametrize(("flags", "ids", "told"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    demo: Path, base: Path, tmp_path: Path, flags: Callable[[Path], dict[str, Any]], ids: list[str], told: str
) -> None:
    with pytest.raises(MMError) as raised:
        train_command.main(words(demo, tmp_path / "run", train_iters=1, **flags(base)))
    assert [problem.id for problem in raised.value.problems] == ids
    assert told in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_resume_trains_the_same_parameters(demo: Path, base: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "run", train_iters=1, load=base, **PARTS)

    def ids(**more: Any) -> list[str]:
        with pytest.raises(MMError) as raised:
            run(demo, tmp_path / "run", **{"train_iters": 2, "load": base, **PARTS, **more})
        return [problem.id for problem in raised.value.problems]

    assert ids(trainable_modules=None) == ["CFG-423"]
    assert ids(trainable_modules=["self_attn", "ffn:0.5", "head"]) == ["CFG-423"]
    assert ids(trainable_modules=None, train_iters=1) == ["CFG-423"]
    assert ids(trainable_modules=["self_attn", "ffn:0.25"]) == ["CFG-160"]
    slower = {"trainable_modules": ["ffn:0.25", "self_attn"], "resume_changed": ["optimizer"]}
    assert len(run(demo, tmp_path / "run", train_iters=2, load=base, **slower)) == 2
    run(demo, tmp_path / "whole", train_iters=1, load=tmp_path / "run", finetune=True)


def test_memory_is_that_of_what_is_trained(demo: Path) -> None:
    """The dry run counts 4 bytes of gradient and 8 of moments for each; advice takes the same shares."""
    wan = PUBLISHED["Wan2.1 T2V 1.3B"].model_copy(update={"num_layers": 2})
    sizes = {name: math.prod(shape) for name, shape in whole_shapes(wan).items()}
    trained = sum(size for name, size in sizes.items() if is_trained(name))

    def sections(**flags: Any) -> Any:
        return read_training(words(demo, None, train_iters=1, **flags), 1)

    asked = sections(**PARTS)
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"shape": wan})})
    model = trained_model(asked)
    assert model.parts is not None and model.elements(sum(sizes.values())) == trained
    job = DryRunJob(wan, Layout(1), DataParallelOptions(), None, torch.float32, (2, 4, 4), 1, 1,
                    extension=model.extension())  # fmt: skip
    report = dry_run(job, 0)
    assert (report.parameters, report.trained) == (sum(sizes.values()), trained)
    assert report.gradient_bytes == pytest.approx(4 * trained, rel=1e-3)
    assert report.optimizer_bytes == pytest.approx(8 * trained, rel=1e-3)
    assert report.parameter_bytes == pytest.approx(4 * sum(sizes.values()), rel=1e-2)
    held = MemoryBreakdown("forward and backward", 0, 100, 100, 200, 0)
    whole = asked.model_copy(update={"training": asked.training.model_copy(update={"trainable": None})})
    assert freed_bytes(whole, asked, held) == pytest.approx(300 * (1 - trained / sum(sizes.values())))
