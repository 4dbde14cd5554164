"""`mm train` with LoRA: what changes and is saved, how it goes on, what others make of the result, what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from training_runs import WEIGHTS, bits, metrics, run, words

from mm.checkpoint.formats.folder import PEFT_FILE
from mm.checkpoint.identity import identity
from mm.checkpoint.store import read_manifest
from mm.checkpoint.weights import open_weights
from mm.cli import convert as convert_command
from mm.cli import train as train_command
from mm.errors import MMError, ResumeError
from mm.lora.adapter import Adapter, Update
from mm.lora.files import COMFYUI_FILE, read_adapter, write_adapter
from mm.lora.inspection import inspect
from mm.lora.record import AdapterRecord
from mm.wan.model import WanModel

WORDS = ["q", "to_v", "proj_out", "ffn.0"]


def lora(demo: Path, **flags: Any) -> dict[str, Any]:
    return {
        "load": None, "load_base_model": demo / WEIGHTS, "lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": WORDS,
        **flags,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(demo: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three LoRA steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(demo, folder, train_iters=3, **lora(demo, load_base_model=base))
    return folder


ROWS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-distributed-optimizer": {"bf16": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "int8-recomputed": {"bf16": True, "lora_base_dtype": "int8", "recompute_granularity": "selective"},
}


@pytest.mark.parametrize("row", ROWS)
def test_six_steps_are_three_and_three(demo: Path, base: Path, tmp_path: Path, model_json: Path, row: str) -> None:
    flags = {"lr_decay_style": "cosine", "lr_decay_iters": 6, "mm_model": model_json, **ROWS[row]}
    flags = lora(demo, load_base_model=base, **flags)
    straight = run(demo, tmp_path / "straight", train_iters=6, **flags)
    run(demo, tmp_path / "stopped", train_iters=3, **flags)
    resumed = run(demo, tmp_path / "stopped", train_iters=6, **flags)
    assert bits(resumed) == bits(straight)
    assert len({row["loss_hex"] for row in straight}) == 6
    for file in ("shard-00000-of-00001.safetensors", PEFT_FILE, COMFYUI_FILE):
        one, other = (tmp_path / name / "iter_0000006" / file for name in ("straight", "stopped"))
        assert one.read_bytes() == other.read_bytes(), file


def test_what_is_left_out_has_no_adapter_and_stays_so(demo: Path, tmp_path: Path) -> None:
    flags = lora(demo, load_base_model=demo / WEIGHTS, lora_skip_modules=["cross_attn", "blocks.0."])
    run(demo, tmp_path, train_iters=1, **flags)
    adapted = read_manifest(tmp_path / "iter_0000001").scalars["adapters"]["adapted"]
    blocks = open_weights(demo / WEIGHTS).config().num_layers
    names = ("self_attn.q", "self_attn.v", "self_attn.o", "ffn.0")
    assert set(adapted) == {f"blocks.{block}.{name}" for block in range(1, blocks) for name in names}
    with pytest.raises(ResumeError, match=r"CKPT-082.*blocks\.0\."):
        run(demo, tmp_path, train_iters=2, **{**flags, "lora_skip_modules": ["cross_attn"]})


def test_only_adapters_are_saved_and_the_base_is_named(demo: Path, base: Path, trained: Path) -> None:
    manifest = read_manifest(trained / "iter_0000003")
    linears = [
        f"blocks.{block}.{name}"
        for block in range(open_weights(base).config().num_layers)
        for name in (
            "self_attn.q",
            "self_attn.v",
            "self_attn.o",
            "cross_attn.q",
            "cross_attn.v",
            "cross_attn.o",
            "ffn.0",
        )
    ]
    assert set(manifest.tensors) == {
        f"{kind}{linear}.{half}"
        for kind in ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
        for linear in linears
        for half in ("lora_A", "lora_B")
    }
    said = manifest.scalars["adapters"]
    assert said["adapted"] == {linear: [4, 8.0] for linear in linears}
    assert said["base"] == {"path": str(base), "identity": identity(open_weights(base)), "dtype": None}
    assert read_adapter(trained / "iter_0000003").texts["base_identity"] == said["base"]["identity"]
    peft, comfyui = (read_adapter(trained / "iter_0000003" / file) for file in (PEFT_FILE, COMFYUI_FILE))
    assert peft.adapted() == comfyui.adapted() and peft.texts == comfyui.texts
    assert all(torch.equal(value, comfyui.parameters()[name]) for name, value in peft.parameters().items())


@torch.no_grad()
def test_diffusers_loads_the_exported_file_and_the_merged_weights_equal_it(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    """The adapter beside the checkpoint, in diffusers on the base; and merged, in our model and in diffusers'."""
    random = torch.Generator().manual_seed(1)
    config = open_weights(base).config()
    inputs = (
        torch.randn(1, 16, 3, 8, 8, generator=random), torch.tensor([637.0]),
        torch.randn(1, 32, config.text_dim, generator=random),
    )  # fmt: skip
    theirs = WanTransformer3DModel.from_pretrained(base)
    plain = theirs(*inputs).sample
    WanPipeline(None, None, None, UniPCMultistepScheduler(), theirs).load_lora_weights(trained / "iter_0000003")
    expected = theirs(*inputs).sample
    assert relative(plain, expected) > 1e-3  # the adapter does something
    for name in ("hf", "native"):
        convert_command.main(["--mode", "merge_lora", "--to", name, "--source_path", str(trained),
                              "--base_path", str(base), "--target_path", str(tmp_path / name)])  # fmt: skip
        assert relative(WanModel.from_pretrained(tmp_path / name).velocity(*inputs), expected) <= 1e-5
    assert relative(WanTransformer3DModel.from_pretrained(tmp_path / "hf")(*inputs).sample, expected) <= 1e-5
    for family in ("hf", "comfyui"):
        file = tmp_path / f"{family}.safetensors"
        convert_command.main(["--mode", f"lora_to_{family}", "--source_path", str(trained), "--target_path", str(file)])
        again = WanTransformer3DModel.from_pretrained(base)
        WanPipeline(None, None, None, UniPCMultistepScheduler(), again).load_lora_weights(file)
        assert relative(again(*inputs).sample, expected) <= 1e-6


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


def test_a_run_begins_with_the_adapters_of_a_file_or_of_a_run(
    demo: Path, base: Path, trained: Path, tmp_path: Path
) -> None:
    """The first loss tells: it is that of the merged model, and not that of the base."""
    merged, file = tmp_path / "merged", trained / "iter_0000003" / PEFT_FILE
    convert_command.main(["--mode", "merge_lora", "--source_path", str(trained), "--base_path", str(base),
                          "--target_path", str(merged)])  # fmt: skip
    expected = run(demo, tmp_path / "0", train_iters=1, load=merged)[0]["loss"]
    fresh = run(demo, tmp_path / "1", train_iters=1, **lora(demo, load_base_model=base))[0]["loss"]
    assert fresh == run(demo, tmp_path / "2", train_iters=1, load=base)[0]["loss"] != expected
    from_file = run(demo, tmp_path / "3", train_iters=1, **lora(demo, load_base_model=base, load=file))
    from_run = run(demo, tmp_path / "4", train_iters=1, **lora(demo, load_base_model=base, load=trained, finetune=True))
    comfyui = {"load": trained / "iter_0000003" / COMFYUI_FILE}
    from_comfyui = run(demo, tmp_path / "6", train_iters=1, **lora(demo, load_base_model=base, **comfyui))
    assert bits(from_file) == bits(from_run) == bits(from_comfyui)
    assert from_file[0]["loss"] == pytest.approx(expected, rel=1e-6)
    gone_on = run(demo, tmp_path / "5", train_iters=4, **lora(demo, load_base_model=base, load=trained))
    assert [row["step"] for row in gone_on] == [4]


LAYOUTS: list[dict[str, Any]] = [
    {"pipeline_model_parallel_size": 2, "use_distributed_optimizer": True},
    {"layerzero": True},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute_granularity": "selective"},
    {"context_parallel_size": 2},
]


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


@pytest.mark.nightly
def test_a_run_that_changes_its_layout_goes_on_as_if_nothing_had_happened(
    demo: Path, base: Path, tmp_path: Path
) -> None:
    """Adapters of the last block alone: the first stage of the pipeline, rank 0 with it, has nothing to train."""
    zero = tmp_path / "zero_config.yaml"
    zero.write_text("zero3_size: 2\n")
    last = open_weights(base).config().num_layers - 1
    targets = [f"blocks.{last}.{name}" for name in ("self_attn.q", "ffn.0", "ffn.2")]
    flags = lora(demo, load_base_model=base, lora_target_modules=targets, micro_batch_size=2, global_batch_size=8)
    commands = []
    for index, layout in enumerate(LAYOUTS):
        config = {"layerzero_config": zero} if "layerzero" in layout else {}
        commands.append(words(demo, tmp_path / "many", train_iters=2 * index + 2, **flags, **layout, **config))
    run_ranks(2, train_one_after_the_other, commands, timeout_s=240)
    single = run(demo, tmp_path / "single", train_iters=2 * len(LAYOUTS), **flags)
    many = metrics(tmp_path / "many")
    assert [row["step"] for row in many] == [row["step"] for row in single]
    for ours, theirs in zip(many, single, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    steps = [read_manifest(tmp_path / name / "iter_0000008").scalars["adam_step"] for name in ("many", "single")]
    assert steps == [8, 8]
    ours, theirs = (load_file(tmp_path / name / "iter_0000008" / PEFT_FILE) for name in ("many", "single"))
    assert ours.keys() == theirs.keys()
    assert max(relative(ours[name], value) for name, value in theirs.items()) <= 1e-3


@pytest.mark.nightly
def test_bf16_on_layouts_is_bf16_in_one_process(demo: Path, base: Path, model_json: Path, tmp_path: Path) -> None:
    """Sums of bf16 in another order: losses within 1e-3, the gradient norm within 3 %."""
    zero = tmp_path / "zero_config.yaml"
    zero.write_text("zero3_size: 2\n")
    flags = lora(demo, load_base_model=base, bf16=True, mm_model=model_json, micro_batch_size=2, global_batch_size=4)
    layouts = [*LAYOUTS, {"tensor_model_parallel_size": 2, "lora_base_dtype": "int8"}]
    commands = [
        words(demo, tmp_path / str(index), train_iters=2, **flags, **layout,
              **({"layerzero_config": zero} if "layerzero" in layout else {}))
        for index, layout in enumerate(layouts)
    ]  # fmt: skip
    run_ranks(2, train_one_after_the_other, commands, timeout_s=240)
    for index, layout in enumerate(layouts):
        kept = {"lora_base_dtype": layout.get("lora_base_dtype")}
        single = run(demo, tmp_path / f"single {index}", train_iters=2, **{**flags, **kept})
        for ours, theirs in zip(metrics(tmp_path / str(index)), single, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), layout
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2), layout


def other_base(demo: Path, folder: Path) -> Path:
    """The base with one element of one tensor changed."""
    shutil.copytree(demo / WEIGHTS, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["blocks.1.ffn.net.2.weight"].view(-1)[0] += 1
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def refused(action: Callable[[], object]) -> list[str]:
    with pytest.raises(MMError) as caught:
        action()
    return [f"{problem.id} {problem.message} {problem.remedy}" for problem in caught.value.problems]


def test_going_on_otherwise_is_refused_with_both_values(demo: Path, base: Path, trained: Path, tmp_path: Path) -> None:
    flags = lora(demo, load_base_model=base)
    (told,) = refused(lambda: run(demo, trained, train_iters=4, **{**flags, "lora_r": 8}))
    assert re.search(r"CKPT-082.*r 4, alpha 8 there, r 8, alpha 8 here", told)
    (told,) = refused(lambda: run(demo, trained, train_iters=4, **{**flags, "lora_alpha": 4.0}))
    assert re.search(r"CKPT-082.*alpha 8 there, r 4, alpha 4 here", told)
    (told,) = refused(lambda: run(demo, trained, train_iters=4, **{**flags, "lora_target_modules": ["q"]}))
    assert re.search(r"CKPT-082.*self_attn.v is r 4, alpha 8 there, not adapted here", told)
    another = other_base(demo, tmp_path / "base")
    (told,) = refused(lambda: run(demo, trained, train_iters=4, **{**flags, "load_base_model": another}))
    here, there = identity(open_weights(another)), identity(open_weights(base))
    assert told.startswith("CKPT-083") and all(value in told for value in (str(another), here, str(base), there))
    (told,) = refused(lambda: run(demo, trained, train_iters=4, **{**flags, "lora_base_dtype": "fp8"}))
    assert re.search("CKPT-083.*kept in fp8", told)
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)  # the same base in another place is the same base
    shutil.copytree(trained, tmp_path / "run")
    assert len(run(demo, tmp_path / "run", train_iters=4, **{**flags, "load_base_model": moved})) == 4


def test_the_wrong_kind_of_weights_is_refused(demo: Path, base: Path, trained: Path, tmp_path: Path) -> None:
    flags = lora(demo, load_base_model=base)
    run(demo, tmp_path / "whole", train_iters=1)
    other_size = Adapter({"blocks.0.self_attn.q": Update(torch.zeros(4, 7), torch.zeros(9, 4), 8.0)})
    write_adapter(tmp_path / "other.safetensors", other_size, "peft")
    rows: list[tuple[str, Path, dict[str, Any], str]] = [
        ("CKPT-080", trained, {"load": base}, "--load-base-model"),
        ("CKPT-081", tmp_path / "whole", flags, "--load-base-model"),
        ("CKPT-081", tmp_path / "a", {**flags, "load": tmp_path / "whole"}, "--load-base-model"),
        ("CKPT-084", tmp_path / "b", {**flags, "load_base_model": trained}, "merge_lora"),
        ("CKPT-084", tmp_path / "c", {"load": trained, "finetune": True}, "merge_lora"),
        ("DATA-093", tmp_path / "g", {**flags, "load": tmp_path / "other.safetensors"}, "this size"),
        ("DATA-095", tmp_path / "d", {**flags, "load": base}, "--load-base-model"),
        ("DATA-094", tmp_path / "e", {**flags, "load": trained / "iter_0000003" / PEFT_FILE, "lora_r": 2}, "values"),
        ("CFG-100", tmp_path / "f", {**flags, "lora_target_modules": ["proj_q", "head"]}, "linears of a block are"),
    ]
    for expected, save, given, remedy in rows:
        (told,) = refused(lambda: run(demo, save, train_iters=2, **given))  # noqa: B023
        assert told.startswith(expected), (expected, told)
        assert remedy in told, (remedy, told)


def test_a_whole_model_that_was_trained_here_is_a_base(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path / "whole", train_iters=1)
    rows = run(demo, tmp_path / "lora", train_iters=1, **lora(demo, load_base_model=tmp_path / "whole"))
    assert [row["step"] for row in rows] == [1]


def test_bad_conversions(base: Path, trained: Path, tmp_path: Path) -> None:
    target = ["--target_path", str(tmp_path / "out")]
    source = ["--source_path", str(trained)]
    rows = [
        ("CFG-107", ["--mode", "merge_lora", *source]),
        ("CFG-073", ["--mode", "lora_to_hf", *source, "--base_path", str(base)]),
        (
            "CFG-073",
            ["--mode", "merge_lora", "--to", "native", *source, "--base_path", str(base), "--ckpt_path", str(base)],
        ),
        ("CKPT-084", ["--mode", "convert_to_native", *source]),
        ("DATA-090", ["--mode", "lora_to_hf", "--source_path", str(base)]),
        ("CFG-071", ["--mode", "lora_to_fh", *source]),
    ]
    for expected, line in rows:
        told = refused(lambda: convert_command.main([*line, *target]))  # noqa: B023
        assert [text.split()[0] for text in told] == [expected], told
    assert not (tmp_path / "out").exists()


def test_a_run_of_adapters_is_told_by_inspect(trained: Path) -> None:
    found, problem = inspect(trained)
    assert problem is None
    assert found.format == "a LoRA adapter"
    assert found.num_tensors == len(load_file(trained / "iter_0000003" / PEFT_FILE))


def test_what_a_checkpoint_says_of_its_adapters_is_checked(trained: Path) -> None:
    said = read_manifest(trained / "iter_0000003").scalars["adapters"]
    record = AdapterRecord.parse(said, trained)
    assert AdapterRecord.parse(json.loads(json.dumps(record.as_json())), trained) == record
    for bad in ({}, {**said, "adapted": {"q": 3}}, {**said, "base": None}, [said]):
        (told,) = refused(lambda: AdapterRecord.parse(bad, trained))  # noqa: B023
        assert told.startswith("CKPT-012")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_adapters_in_eight_bit_floats_begin_as_their_values_do(
    demo: Path, base: Path, trained: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """A run that begins with such a file is, bit for bit, one that begins with the same numbers in fp32; it goes on."""
    whole = read_adapter(trained / "iter_0000003" / COMFYUI_FILE)
    stored = {name: Update(u.a.to(dtype), u.b.to(dtype), u.alpha) for name, u in whole.updates.items()}
    values = {name: Update(u.a.float(), u.b.float(), u.alpha) for name, u in stored.items()}
    runs = []
    for name, updates in (("small", stored), ("plain", values)):
        file = tmp_path / f"{name}.safetensors"
        write_adapter(file, Adapter(updates), "comfyui")
        flags = lora(demo, load_base_model=base, load=file)
        run(demo, tmp_path / name, train_iters=1, **flags)
        runs.append(run(demo, tmp_path / name, train_iters=2, **flags))
    assert [row["step"] for row in runs[0]] == [1, 2] and bits(runs[0]) == bits(runs[1])
    first, second = (read_adapter(tmp_path / name / "iter_0000002").parameters() for name in ("small", "plain"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "with scales"])
def test_weights_in_eight_bit_floats_begin_as_their_values_do(
    demo: Path, base: Path, tmp_path: Path, scaled: bool
) -> None:
    """The first losses, of LoRA and of full training, are those of the same numbers in fp32, bit for bit."""
    stored, values = {}, {}
    for name, value in load_file(next(base.glob("*.safetensors"))).items():
        if value.ndim == 2 and name.startswith("blocks."):
            scale = value.abs().amax() / 448 if scaled else torch.tensor(1.0)
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            values[name] = stored[name].float() * scale
            if scaled:
                stored[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            stored[name] = values[name] = value
    for folder, tensors in (("small", stored), ("plain", values)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "diffusion_pytorch_model.safetensors")
        shutil.copy(base / "config.json", tmp_path / folder)
    for name, flags in (("lora", lambda path: lora(demo, load_base_model=path)), ("full", lambda path: {"load": path})):
        ours, theirs = (
            run(demo, tmp_path / f"{name} {folder}", train_iters=2, **flags(tmp_path / folder))
            for folder in ("small", "plain")
        )
        assert bits(ours) == bits(theirs)
