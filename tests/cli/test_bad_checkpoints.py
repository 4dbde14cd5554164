"""What can be wrong with weights and checkpoints, at the level of the commands: one line with an id and a remedy, the
right exit code, and everything that was there is there afterwards, byte for byte."""

import importlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import MODEL, Workplace, everything, truncate

from mm.checkpoint import fault
from mm.checkpoint.convert import convert_to_mm
from mm.checkpoint.lock import locked
from mm.cli import train as train_command
from mm.cli.entry import run
from mm.lora.adapter import Adapter, Update
from mm.lora.files import write_adapter

FILE = "diffusion_pytorch_model.safetensors"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def home(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded default with what it can be turned into: sharded weights, MM folders, a run of two steps, a LoRA."""
    place = Workplace(Path(shutil.copytree(demo, tmp_path_factory.mktemp("bad") / "home")))
    transformer = place.home / MODEL / "transformer"
    tensors = load_file(transformer / FILE)
    sharded = place.home / "sharded"
    sharded.mkdir()
    shutil.copy(transformer / "config.json", sharded)
    weight_map, parts = {}, list(tensors)
    for number, part in enumerate((parts[::2], parts[1::2]), start=1):
        name = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, sharded / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (sharded / f"{FILE}.index.json").write_text(json.dumps(index))
    blocks = json.loads((transformer / "config.json").read_text())["num_layers"]
    convert_to_mm(transformer, place.home / "mm")
    convert_to_mm(transformer, place.home / "stages", ((1, blocks - 1),))
    train_command.main([*place.words("train"), "--save-interval", "1", "--train-iters", "2"])
    narrow = {f"blocks.{block}.self_attn.q": Update(torch.ones(2, 24), torch.ones(24, 2), 2.0) for block in range(2)}
    write_adapter(place.home / "other_lora.safetensors", Adapter(narrow, {}), "peft")
    return place.home


@pytest.fixture
def place(home: Path, tmp_path: Path) -> Workplace:
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    for path in (copy / "configs").rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace(str(home), str(copy)))
    return Workplace(copy)


def tensors_changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Workplace], None]:
    def damage(place: Workplace) -> None:
        file = place.home / MODEL / "transformer" / FILE
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def cut_to_one_row(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"][:1].clone()


def in_whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)


def newest(place: Workplace) -> Path:
    return place.out / "iter_0000002"


def both_truncated(place: Workplace) -> None:
    for step in (1, 2):
        truncate(next(place.out.glob(f"iter_000000{step}/shard-*")))


def as_one_and_as_stages(place: Workplace) -> None:
    shutil.copytree(place.home / "mm/release/mp_rank_00", place.home / "stages/release/mp_rank_00")


def two_sets(place: Workplace) -> None:
    """Shards and the whole, without an index that would tell which is meant."""
    (place.home / "sharded" / f"{FILE}.index.json").unlink()
    shutil.copy(place.home / MODEL / "transformer" / FILE, place.home / "sharded" / "model.safetensors")


def write(name: str, text: str) -> Callable[[Workplace], None]:
    def damage(place: Workplace) -> None:
        (place.home / name).write_text(text)

    return damage


def remove(name: str) -> Callable[[Workplace], None]:
    def damage(place: Workplace) -> None:
        path = place.home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def other_stages(place: Workplace) -> None:
    place.edit("configs/pretrain_model.json", lambda c: c["predictor"].update(pipeline_num_layers=[1, 99]))


def nothing(place: Workplace) -> None:
    """The words alone are wrong."""


Words = Callable[[Workplace], list[str]]


def convert(mode: str, source: str, *more: str, target: str = "new") -> Words:
    return lambda place: ["convert", "--mode", mode, "--source_path", str(place.home / source), "--target_path",
                          str(place.home / target), *more]  # fmt: skip


def merge(place: Workplace) -> list[str]:
    base = str(place.home / MODEL / "transformer")
    return [*convert("merge_lora", "other_lora.safetensors")(place), "--base_path", base]


def train(*more: str, load: str | None = None, save: str = "new") -> Words:
    def words(place: Workplace) -> list[str]:
        found = ["train", *place.words("train"), "--save", str(place.home / save), *more]
        return [*found, "--load", str(place.home / load)] if load is not None else found

    return words


def finetune(place: Workplace) -> list[str]:
    words = train("--lora-r", "2", "--lora-alpha", "2", "--lora-target-modules", "self_attn.q")(place)
    return [*words, "--load-base-model", str(place.home / MODEL / "transformer"), "--load",
            str(place.home / "other_lora.safetensors")]  # fmt: skip


def lora_resume(place: Workplace) -> list[str]:
    return [*finetune(place)[:-2], "--train-iters", "3", "--save", str(place.out)]


def without_the_optimizer(place: Workplace) -> None:
    """As a run with --no-save-optim leaves its checkpoints."""
    for file in place.out.glob("iter_*/manifest.json"):
        manifest = json.loads(file.read_text())
        assert manifest["scalars"]["adam_step"] is not None
        manifest["scalars"]["adam_step"] = None
        file.write_text(json.dumps(manifest))


TRANSFORMER = f"{MODEL}/transformer"
LAST = "stages/release/mp_rank_00_001"
SECOND = "sharded/diffusion_pytorch_model-00002-of-00002.safetensors"
RESUME = {"save": "out"}
CASES: dict[str, tuple[Words, Callable[[Workplace], None], str, int]] = {
    **{f"existing target, {mode}": (convert(mode, TRANSFORMER, target="mm"), nothing, "CKPT-020", 74)
       for mode in ("convert_to_mm", "convert_to_hf", "convert_to_native")},
    "existing target, resplit": (convert("resplit", "stages", "--pp_vpp_layers", "[1,1,1]", target="mm"), nothing,
                                 "CKPT-020", 74),
    "existing target, zero_to_bf16": (convert("zero_to_bf16", "out", target="mm"), nothing, "CKPT-020", 74),
    "missing shard, convert": (convert("convert_to_mm", "sharded"), remove(SECOND), "DATA-024", 65),
    "missing shard, train": (train(load="sharded"), remove(SECOND), "DATA-024", 65),
    "missing stage, convert": (convert("convert_to_hf", "stages"), remove(LAST), "CKPT-041", 74),
    "missing stage, train": (train(load="stages"), remove(LAST), "CKPT-041", 74),
    "truncated shard, convert": (convert("convert_to_mm", "sharded"), lambda p: truncate(p.home / SECOND),
                                 "DATA-022", 65),
    "truncated shards, resume": (train("--train-iters", "3", **RESUME), both_truncated, "CKPT-013", 74),
    "truncated newest, strict": (train("--train-iters", "3", "--resume-policy", "strict", **RESUME),
                                 lambda p: truncate(next(newest(p).glob("shard-*"))), "CKPT-013", 74),
    "truncated .pt": (train(load="mm"),
                      lambda p: truncate(p.home / "mm/release/mp_rank_00/model_optim_rng.pt"), "CKPT-021", 74),
    "wrong key, convert": (convert("convert_to_mm", TRANSFORMER),
                           tensors_changed(lambda t: t.update(surprise=t.pop("proj_out.bias"))), "CKPT-011", 74),
    "wrong key, train": (train(), tensors_changed(lambda t: t.update(surprise=t.pop("proj_out.bias"))), "CKPT-011", 74),
    "wrong shape, convert": (convert("convert_to_mm", TRANSFORMER), tensors_changed(cut_to_one_row), "CKPT-011", 74),
    "wrong shape, train": (train(), tensors_changed(cut_to_one_row), "CKPT-011", 74),
    "wrong dtype, convert": (convert("convert_to_mm", TRANSFORMER), tensors_changed(in_whole_numbers), "DATA-031", 65),
    "wrong dtype, train": (train(), tensors_changed(in_whole_numbers), "DATA-031", 65),
    "mixed files, convert": (convert("convert_to_hf", "stages"), as_one_and_as_stages, "CKPT-042", 74),
    "mixed files, train": (train(load="stages"), as_one_and_as_stages, "CKPT-042", 74),
    "mixed shards, train": (train(load="sharded"), two_sets, "DATA-030", 65),
    "blocks that do not add up, convert": (convert("convert_to_mm", TRANSFORMER, "--pp_vpp_layers", "[1,99]"), nothing,
                                           "CKPT-040", 74),
    "blocks that do not add up, train": (train(), other_stages, "CFG-027", 64),
    "LoRA of another size, merge": (merge, nothing, "DATA-093", 65),
    "LoRA of another size, train": (finetune, nothing, "DATA-093", 65),
    "tracker names nothing, convert": (convert("convert_to_hf", "mm"), write(f"mm/{TRACKER}", "77"), "CKPT-010", 74),
    "tracker names nothing, train": (train(load="mm"), write(f"mm/{TRACKER}", "77"), "CKPT-010", 74),
    "tracker names nothing, strict": (train("--train-iters", "3", "--resume-policy", "strict", **RESUME),
                                      write(f"out/{TRACKER}", "77"), "CKPT-013", 74),
    "tracker empty, strict": (train("--train-iters", "3", "--resume-policy", "strict", **RESUME),
                              write(f"out/{TRACKER}", ""), "CKPT-013", 74),
    "another seed, resume": (train("--train-iters", "3", "--seed", "1", **RESUME), nothing, "CKPT-071", 64),
    "no optimizer, resume": (train("--train-iters", "3", **RESUME), without_the_optimizer, "CKPT-072", 64),
    "an average that is not there, resume": (train("--train-iters", "3", "--ema-decay", "0.9", **RESUME), nothing,
                                             "CKPT-085", 64),
    "a LoRA on a whole model's checkpoint": (lora_resume, nothing, "CKPT-081", 64),
    "another --ckpt-format": (train("--ckpt-format", "torch", "--no-save-optim", "--no-load-optim", **RESUME), nothing,
                              "CKPT-050", 64),
    "a file where the folder should be": (train(save="other_lora.safetensors/run"), nothing, "CFG-131", 64),
    "a file where the target should be": (convert("convert_to_mm", TRANSFORMER, target="other_lora.safetensors/new"),
                                          nothing, "CFG-131", 64),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_is_lost(place: Workplace, capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, damage, expected, exit_code = CASES[case]
    damage(place)
    require_refused(place, capsys, words(place), expected, exit_code)


def require_refused(
    place: Workplace, capsys: pytest.CaptureFixture[str], words: list[str], expected: str, exit_code: int
) -> None:
    before = everything(place.home)
    command, *rest = words
    assert run(importlib.import_module(f"mm.cli.{command}").main, rest) == exit_code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error ")]
    assert lines and all(line.startswith(f"error {expected}: ") and " Fix: " in line for line in lines), lines
    after = everything(place.home)
    assert {path: after.get(path) for path in before} == before, "something that was there changed"
    new = [path for path in sorted(after.keys() - before.keys()) if "tensorboard/" not in path]
    assert [path for path in new if not path.startswith(("new/.lock", "new/metrics.jsonl", "out/.lock"))] == []


@pytest.mark.parametrize("command", ["train", "convert"])
def test_a_place_that_cannot_be_written(place: Workplace, capsys: pytest.CaptureFixture[str], command: str) -> None:
    """Permissions do not bind root, but nobody makes folders below /proc/sys."""
    if command == "train":
        words = train(save="/proc/sys/new")
    else:
        words = convert("convert_to_mm", TRANSFORMER, target="/proc/sys/new")
    require_refused(place, capsys, words(place), "CFG-131", 64)


@pytest.mark.parametrize("point", ["save.shard_half_written", "save.manifest_written"])
def test_a_disk_that_fills_up_while_training_saves(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    before = {path: content for path, content in everything(place.home).items() if "out/iter_" in path}
    with monkeypatch.context() as patch:
        patch.setenv("MM_FAULT", f"{point}:1:enospc")
        patch.setattr(fault, "_passed", Counter())
        words = train("--train-iters", "3", **RESUME)(place)[1:]
        assert run(train_command.main, words) == 74
    told = capsys.readouterr().err
    assert "error CKPT-031: " in told and "No space left on device" in told
    after = everything(place.home)
    assert {path: after.get(path) for path in before} == before
    assert sorted(path.name for path in place.out.glob("*iter*")) == ["iter_0000001", "iter_0000002", TRACKER]
    assert run(train_command.main, words) == 0
    assert (place.out / "iter_0000003" / "manifest.json").exists()


def test_a_disk_that_fills_up_while_converting(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MM_FAULT", "convert.files_written:1:enospc")
        patch.setattr(fault, "_passed", Counter())
        require_refused(place, capsys, convert("convert_to_mm", TRANSFORMER)(place), "CKPT-031", 74)


def test_a_second_job_on_the_folder(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(place.out):
        require_refused(place, capsys, train("--train-iters", "3", **RESUME)(place), "CKPT-034", 74)
    assert run(train_command.main, train("--train-iters", "3", **RESUME)(place)[1:]) == 0


@pytest.mark.parametrize(
    ("damage", "step"),
    [
        (lambda p: truncate(next(newest(p).glob("shard-*"))), 1),
        (lambda p: (newest(p) / "manifest.json").unlink(), 1),
        (write(f"out/{TRACKER}", "77"), 2),
        (write(f"out/{TRACKER}", ""), 2),
        (write(f"out/{TRACKER}", "1"), 1),
    ],
    ids=["truncated", "no manifest", "tracker names nothing", "tracker empty", "tracker edited to go back"],
)
def test_a_run_goes_on_from_what_is_left(
    place: Workplace, caplog: pytest.LogCaptureFixture, damage: Callable[[Workplace], None], step: int
) -> None:
    """By default; a warning says what was wrong, or that the tracker was followed."""
    caplog.set_level("INFO")
    damage(place)
    assert run(train_command.main, train("--train-iters", "3", **RESUME)(place)[1:]) == 0
    assert f"going on from {place.out / f'iter_000000{step}'}: step {step}" in caplog.text
    assert [record for record in caplog.records if record.name == "mm.checkpoint.directory" and record.levelno >= 30]
