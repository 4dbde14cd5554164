"""`--ckpt-format torch`: MindSpeed-MM's files of the weights that the sharded format has; going on from them."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from training_runs import WEIGHTS, bits, metrics, run, words

from mm.checkpoint import fault
from mm.checkpoint.fault import FaultInjected
from mm.checkpoint.weights import open_weights
from mm.cli import convert as convert_command
from mm.cli import train as train_command
from mm.errors import CheckpointError, ConfigError

STEPS = 3
TORCH = {"ckpt_format": "torch", "no_save_optim": True}
GO_ON = {**TORCH, "no_load_optim": True}
BATCH = {"micro_batch_size": 1, "global_batch_size": 4}
PIPELINE = "pipeline_model_parallel_size"
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
ROWS: dict[str, dict[str, Any]] = {
    "dp2": {"bf16": True, **OVERLAPPED},
    "cp2": {"context_parallel_size": 2},
    "pp2": {PIPELINE: 2, "bf16": True},
    "pp2vp2": {PIPELINE: 2, "virtual_pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def single(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process in both formats."""
    folder = tmp_path_factory.mktemp("single")
    run(demo, folder / "torch_dist", train_iters=STEPS, save_interval=1, **BATCH)
    run(demo, folder / "torch", train_iters=STEPS, save_interval=1, **BATCH, **TORCH)
    return folder


@pytest.fixture(scope="module")
def every_layout(demo: Path, model_json: Path, single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes in both formats, and of two that go on from step 2 of one process."""
    folder, commands = tmp_path_factory.mktemp("layouts"), []
    for name, row in ROWS.items():
        for kind, more in (("torch_dist", {}), ("torch", TORCH)):
            flags = {"train_iters": STEPS, "save_interval": 2, "mm_model": model_json, **BATCH, **row, **more}
            commands.append(words(demo, folder / name / kind, **flags))
    for name in ("pp2vp2", "cp2"):
        shutil.copytree(single / "torch" / "iter_0000002", folder / "from one" / name / "iter_0000002")
        flags = {"train_iters": STEPS, "mm_model": model_json, **BATCH, **ROWS[name], **GO_ON}
        commands.append(words(demo, folder / "from one" / name, **flags))
    run_ranks(2, train_one_after_the_other, commands, timeout_s=300)
    return folder


def train_one_after_the_other(commands: list[list[str]]) -> None:
    for command in commands:
        train_command.main(command)


def read(folder: Path, rank: str = "mp_rank_00") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / rank / "model_optim_rng.pt", weights_only=True)
    return content


def test_what_is_on_disk(single: Path) -> None:
    """As Megatron lays it out: the step as text, seven digits, a flat state dict in MM names, the step inside."""
    root = single / "torch"
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"3"
    assert sorted(path.name for path in root.glob("iter_*")) == [f"iter_000000{step}" for step in (1, 2, 3)]
    newest = root / "iter_0000003"
    assert [path.name for path in newest.iterdir()] == ["mp_rank_00"]  # its tools take whatever is here for a rank's
    assert {path.name for path in (newest / "mp_rank_00").iterdir()} == {
        "model_optim_rng.pt", "mm_record.json", ".tracker_done",
    }  # fmt: skip
    content = read(newest)
    assert list(content) == ["model", "iteration", "checkpoint_version"]
    assert (content["iteration"], content["checkpoint_version"]) == (3, 3.0)
    assert {"blocks.0.self_attn.proj_q.weight", "head.head.weight", "text_embedding.linear_1.weight"} <= set(
        content["model"]
    )
    elements = sum(value.numel() for value in content["model"].values())
    size = (newest / "mp_rank_00" / "model_optim_rng.pt").stat().st_size
    assert 4 * elements < size < 4.1 * elements + 1e5  # no buffer is saved behind a view of it


def test_it_is_converted_to_the_same_bits(single: Path, tmp_path: Path) -> None:
    for kind in ("torch", "torch_dist"):
        source = ["--source_path", str(single / kind), "--target_path", str(tmp_path / kind)]
        convert_command.main(["--mode", "convert_to_hf", *source])
    ours, theirs = (load_file(next((tmp_path / kind).glob("*.safetensors"))) for kind in ("torch", "torch_dist"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert (tmp_path / "torch/config.json").read_text() == (tmp_path / "torch_dist/config.json").read_text()


@pytest.mark.parametrize("row", ROWS)
def test_every_layout_saves_what_it_trained(every_layout: Path, row: str) -> None:
    """The masters of the sharded format, rounded as the model has them, in the files of the pipeline's ranks."""
    folder, pipeline = every_layout / row, row.startswith("pp")
    source, masters = open_weights(folder / "torch"), open_weights(folder / "torch_dist")
    kinds = source.kinds()
    assert kinds.keys() == masters.kinds().keys()
    for name, kind in kinds.items():
        assert torch.equal(source.read(name), masters.read(name).to(kind.dtype)), name
    dtypes = Counter(kind.dtype for kind in kinds.values())
    assert (dtypes[torch.bfloat16] > 50) == ROWS[row].get("bf16", False)
    newest = folder / "torch" / "iter_0000003"
    ranks = ["mp_rank_00_000", "mp_rank_00_001"] if pipeline else ["mp_rank_00"]
    assert sorted(path.name for path in newest.iterdir()) == ranks
    for rank in ranks:
        models = ["model0", "model1"] if row == "pp2vp2" else ["model"]
        assert list(read(newest, rank)) == [*models, "iteration", "checkpoint_version"]
    blocks = {name.split(".")[1] for name in read(newest, ranks[-1])[models[-1]] if name.startswith("blocks.")}
    assert "0" in blocks  # each stage counts its own from 0
    assert len(blocks) * len(ranks) * len(models) == source.config().num_layers


def test_one_process_goes_on(demo: Path, single: Path, tmp_path: Path) -> None:
    """The step after reads the weights alone, so its loss is that of the run that did not stop, bit for bit."""
    shutil.copytree(single / "torch", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter_0000003")
    rows = run(demo, tmp_path / "run", train_iters=STEPS, **BATCH, **GO_ON)
    straight = metrics(single / "torch")
    assert bits(straight) == bits(metrics(single / "torch_dist"))
    assert rows[:2] == straight[:2]
    assert bits(rows) == bits(straight)  # of step 3 the loss and the gradient come before the new optimizer's update


def test_a_run_of_an_earlier_version_goes_on(demo: Path, single: Path, tmp_path: Path) -> None:
    """Which wrote its record, the model and the marker beside the folders of the ranks."""
    shutil.copytree(single / "torch", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter_0000003")
    for step in (1, 2):
        folder = tmp_path / "run" / f"iter_000000{step}"
        record = json.loads((folder / "mp_rank_00" / "mm_record.json").read_text())
        (folder / "mm_config.json").write_text(json.dumps(record.pop("wan_config")))
        (folder / "mm_record.json").write_text(json.dumps(record))
        (folder / "mp_rank_00" / "mm_record.json").unlink()
        (folder / "mp_rank_00" / ".tracker_done").rename(folder / ".tracker_done")
    flags = {"train_iters": STEPS, "keep_latest": 2, "verify_checkpoint": "full"}
    assert bits(run(demo, tmp_path / "run", **flags, **BATCH, **GO_ON)) == bits(metrics(single / "torch"))
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    source = ["--source_path", str(tmp_path / "run" / "iter_0000002"), "--target_path", str(tmp_path / "hf")]
    convert_command.main(["--mode", "convert_to_hf", *source])


@pytest.mark.parametrize("row", ["pp2vp2", "cp2"])
def test_two_processes_go_on_from_one(every_layout: Path, single: Path, row: str) -> None:
    [ours] = metrics(every_layout / "from one" / row)
    theirs = metrics(single / "torch")[2]
    assert ours["step"] == theirs["step"] == 3
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["consumed_samples"] == theirs["consumed_samples"]


@pytest.mark.parametrize("row", ["pp2", "pp2vp2"])
def test_one_process_goes_on_from_two(
    demo: Path, every_layout: Path, model_json: Path, tmp_path: Path, row: str
) -> None:
    """`--load` goes on from another run's folder too; its own is in the sharded format."""
    flags = {"mm_model": model_json, **BATCH, "bf16": ROWS[row].get("bf16", False), "no_load_optim": True}
    source = tmp_path / "source"
    shutil.copytree(every_layout / row / "torch" / "iter_0000002", source / "iter_0000002")
    [ours] = run(demo, tmp_path / "run", load=source, train_iters=STEPS, **flags)
    theirs = metrics(every_layout / row / "torch")[2]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["step"] == 3
    [first] = run(demo, tmp_path / "first", load=source, train_iters=1, finetune=True, **flags)
    assert first["step"] == 1


def test_what_is_missing_is_asked_for(demo: Path, single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(single / "torch", folder)
    with pytest.raises(CheckpointError, match=r"CKPT-072.*--no-load-optim"):
        run(demo, folder, train_iters=4, **BATCH, **TORCH)
    with pytest.raises(CheckpointError, match="CKPT-071"):
        run(demo, folder, train_iters=4, seed=1, **BATCH, **GO_ON)
    with pytest.raises(CheckpointError, match=r"CKPT-050.*torch, and this run saves torch_dist"):
        run(demo, folder, train_iters=4, **BATCH, no_load_optim=True)
    with pytest.raises(CheckpointError, match=r"CKPT-050.*torch_dist, and this run saves torch\."):
        run(demo, single / "torch_dist", train_iters=4, **BATCH, **GO_ON)
    with pytest.raises(CheckpointError, match="CKPT-081"):
        run(demo, tmp_path / "lora", load=folder, load_base_model=demo / WEIGHTS, lora_r=4, lora_alpha=4.0,
            lora_target_modules=["q"], train_iters=4)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"no_save_optim": False}, "--no-save-optim is absent"),
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size, which"),
        ({"ema_decay": 0.9}, "--ema-decay, which"),
        ({"async_save": True}, "--async-save, which"),
    ],
    ids=["optimizer", "tp", "ema", "async"],
)
def test_what_it_cannot_hold(demo: Path, tmp_path: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"CFG-115.*{told}.*torch_dist"):
        run(demo, tmp_path / "run", train_iters=1, **{**TORCH, **more})
    assert not (tmp_path / "run").exists()


def test_it_needs_a_place(demo: Path) -> None:
    with pytest.raises(ConfigError, match=r"CFG-024.*--ckpt-format torch"):
        run(demo, None, train_iters=1, **TORCH)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "record", "no file"])
def test_a_damaged_newest_gives_way(
    demo: Path, single: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(single / "torch", folder)
    file = folder / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-1])
    elif damage == "flipped":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "record":
        (folder / "iter_0000003" / "mp_rank_00" / "mm_record.json").write_text("{")
    else:
        file.unlink()
    flags = {"train_iters": STEPS, "verify_checkpoint": "full", **BATCH, **GO_ON}
    with pytest.raises(CheckpointError, match=r"CKPT-013.*iter_0000003"):
        run(demo, folder, resume_policy="strict", **flags)
    assert bits(run(demo, folder, **flags)) == bits(metrics(single / "torch"))
    assert "iter_0000003 is not complete" in caplog.text


@pytest.mark.parametrize(
    ("point", "expected"),
    [("save.folder_created", 2), ("save.shard_durable", 2), ("save.before_rename", 2), ("save.committed", 3),
     ("save.tracker_drafted", 3)],
)  # fmt: skip
def test_an_error_at_any_point_leaves_a_whole_checkpoint(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, expected: int
) -> None:
    run(demo, tmp_path, train_iters=2, keep_latest=1, **BATCH, **TORCH)
    with monkeypatch.context() as patch:
        patch.setenv("MM_FAULT", f"{point}:1:raise")
        patch.setattr(fault, "_passed", Counter())
        with pytest.raises(FaultInjected):
            run(demo, tmp_path, train_iters=3, keep_latest=1, **BATCH, **GO_ON)
    assert not list(tmp_path.glob(".tmp-*/mp_rank_00"))
    rows = run(demo, tmp_path, train_iters=4, keep_latest=1, **BATCH, **GO_ON)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.glob("*iter_*")] == ["iter_0000004"]
    assert math.isfinite(rows[-1]["loss"])


def test_a_weight_that_is_not_finite_is_not_saved(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.optim.optimizer import Optimizer

    update = Optimizer.update

    def poisoned(self: Optimizer, norm: float, samples: int) -> None:
        update(self, norm, samples)
        self.shards[0].master[0] = math.nan

    monkeypatch.setattr(Optimizer, "update", poisoned)
    with pytest.raises(CheckpointError, match="CKPT-016"):
        run(demo, tmp_path, train_iters=1, **TORCH)
    assert not list(tmp_path.glob("*iter_*"))
