"""`mm doctor` before a run: one table, one verdict, every reason by id; and `mm doctor compare` after two."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import ANY_PORT
from safetensors.torch import load_file, save_file

from mm.cli import doctor
from mm.cli import train as train_command
from mm.cli import translate as translate_command
from mm.config.base import load
from mm.config.diffusion import DiffusionConfig
from mm.config.flags import as_words
from mm.config.run.data import Mixture
from mm.data.dataset import open_features
from mm.data.planning import sampling_plan
from mm.data.sampler import BatchPlan
from mm.dialects.mindspeed.files import load_train_data
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.dialects.mindspeed.training import features
from mm.diffusion.flow import FlowMatching
from mm.doctor.preflight import draws, same_draws
from mm.errors import ConfigError, DifferenceError

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "wan2.1"
WEIGHTS = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"


def words(demo: Path, save: Path, **flags: Any) -> list[str]:
    return as_words(
        {
            "mm_data": demo / "configs" / "feature_data.json",
            "mm_model": demo / "configs" / "pretrain_model.json",
            "load": demo / WEIGHTS,
            "save": save,
            "micro_batch_size": 4,
            "lr": 1e-3,
            "train_iters": 4,
            "save_interval": 2,
            "num_workers": 0,
            **flags,
        }
    )


def look(demo: Path, save: Path, capsys: pytest.CaptureFixture[str], **flags: Any) -> tuple[dict[str, Any], list[str]]:
    """The report, and the reasons against the run."""
    reasons: list[str] = []
    capsys.readouterr()
    try:
        doctor.main(words(demo, save, json_output=True, **flags))
    except ConfigError as error:
        assert {problem.id for problem in error.problems} == {"CFG-127"}
        reasons = [problem.message for problem in error.problems]
    return json.loads(capsys.readouterr().out), reasons


def test_a_run_that_will_work(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save = tmp_path / "run"
    report, reasons = look(demo, save, capsys)
    assert reasons == []
    assert report["ready"]
    found = {finding["check"]: finding for finding in report["findings"]}
    assert found["operators"]["found"] == "elementwise operators are torch's"
    assert {"versions", "memory", "weights", "checkpoints", "disk", "features", "host memory"} <= found.keys()
    assert all(finding["verdict"] == "ok" for finding in found.values() if finding["check"] != "limits")
    assert found["features"]["found"].startswith("16 samples (16 of 3x8x8)")
    assert not save.exists()  # it leaves nothing behind
    train_command.main([*words(demo, save), "--no-progress-bar"])
    folders = sorted(path.name for path in save.iterdir())
    report, _ = look(demo, save, capsys, train_iters=9)
    told = {finding["check"]: finding["found"] for finding in report["findings"]}
    assert told["checkpoints"] == "goes on from iter_0000004; --load is not used; saved every 2 steps"
    assert "weights" not in told
    assert sorted(path.name for path in save.iterdir()) == folders
    # what was said of a checkpoint's size is what one takes
    weights = sum(path.stat().st_size for path in (save / "iter_0000004").glob("*.safetensors"))
    size, unit = told["disk"].split()[:2]
    assert unit == "MiB" and float(size) == pytest.approx(weights / 2**20, abs=5)


@pytest.mark.nightly
def test_a_resume_is_refused_as_the_run_would_refuse_it(
    demo_of_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another rate, and features of which one has gone: the doctor names what the run's start names."""
    demo, save = demo_of_files, tmp_path / "run"
    train_command.main([*words(demo, save), "--no-progress-bar"])
    report, reasons = look(demo, save, capsys, train_iters=6)
    assert reasons == []
    told = {finding["check"]: finding["found"] for finding in report["findings"]}
    assert told["resume"] == "goes on from iter_0000004 with the same model, steps and features"
    store = Path(shutil.copytree(demo / "features", tmp_path / "features"))
    lines = (store / "data.jsonl").read_text().splitlines(keepends=True)
    (store / "data.jsonl").write_text("".join(lines[1:]))
    (tmp_path / "features.txt").write_text(f"{store}\n")
    content = json.loads((demo / "configs" / "feature_data.json").read_text())
    content["dataset_param"]["basic_parameters"]["data_path"] = str(tmp_path / "features.txt")
    (tmp_path / "features.json").write_text(json.dumps(content))
    changed = {"train_iters": 6, "mm_data": tmp_path / "features.json", "weight_decay": 0.5}
    _, reasons = look(demo, save, capsys, **changed)
    with pytest.raises(ConfigError) as refused:
        train_command.main([*words(demo, save, **changed), "--no-progress-bar"])
    assert reasons == [f"resume: {problem.id}: {problem.message}" for problem in refused.value.problems]
    assert [problem.id for problem in refused.value.problems] == ["CFG-160", "CFG-160"]
    assert look(demo, save, capsys, **changed, resume_changed=["data", "optimizer"])[1] == []


@pytest.mark.nightly
def test_a_plan_that_the_run_would_refuse(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shares of a store that is not there, and one store that ends before the run does."""
    content = json.loads((demo / "configs" / "feature_data.json").read_text())
    for folder, id in ((str(tmp_path / "nowhere"), "CFG-203"), (str(demo / "features"), "CFG-204")):
        content["dataloader_param"] = {"mixture": {"shares": [{"folder": folder, "end_epoch": 1}]}}
        (tmp_path / "features.json").write_text(json.dumps(content))
        changed = {"train_iters": 20, "mm_data": tmp_path / "features.json"}
        _, reasons = look(demo, tmp_path / "run", capsys, **changed)
        with pytest.raises(ConfigError, match=id) as refused:
            train_command.main([*words(demo, tmp_path / "run", **changed), "--no-progress-bar"])
        assert reasons == [f"sampling plan: {problem.id}: {problem.message}" for problem in refused.value.problems]


def test_all_reasons_at_once(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights without one tensor, features of which one is cut off, a folder that cannot be written."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (file,) = (demo / WEIGHTS).glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("proj_out.bias")
    save_file(tensors, broken / file.name)
    (broken / "config.json").write_text((demo / WEIGHTS / "config.json").read_text())
    (tmp_path / "file").write_text("no folder")
    report, reasons = look(demo, tmp_path / "file" / "run", capsys, load=broken)
    assert not report["ready"]
    assert [reason.split(":")[0] for reason in reasons] == ["weights", "checkpoints"]
    assert "head.head.bias" in reasons[0]


@pytest.mark.nightly
def test_weights_of_another_model_of_the_same_shapes(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shape tells the number of heads; their configuration does, and the run would be refused."""
    other = Path(shutil.copytree(demo / WEIGHTS, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    (other / "config.json").write_text(
        json.dumps({**config, "num_attention_heads": heads // 2, "attention_head_dim": size * 2})
    )
    _, reasons = look(demo, tmp_path / "run", capsys, load=other)
    assert [reason.split(":")[:2] for reason in reasons] == [["weights", " CFG-028"]]
    model = demo / "configs" / "pretrain_model.json"
    said = f"{other} has num_heads {heads // 2}, and predictor.num_heads in {model} is {heads}."
    assert said in reasons[0]
    with pytest.raises(ConfigError, match="CFG-028"):
        train_command.main([*words(demo, tmp_path / "run", load=other), "--no-progress-bar"])


@pytest.mark.nightly
def test_more_memory_than_there_is(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """14B at 81x480x832 without recomputation on one device of this host's memory."""
    model = json.loads((EXAMPLES / "14b" / "t2v" / "pretrain_model.json").read_text())
    model["predictor"] |= {"num_layers": 20, "pipeline_num_layers": None, "dtype": "fp32"}
    (tmp_path / "model.json").write_text(json.dumps(model))
    flags = {"mm_model": tmp_path / "model.json", "load": None, "init_from_scratch": True, "micro_batch_size": 1}
    report, reasons = look(demo, tmp_path / "run", capsys, latent_size=[21, 60, 104], **flags)
    (memory,) = [reason for reason in reasons if reason.startswith("memory: ")]
    predicted = report["dry_runs"][0]["peak_bytes"]
    assert memory.startswith(f"memory: {predicted / 2**30:.2f} GiB predicted")
    assert predicted > 16 * report["dry_runs"][0]["parameters"]


@pytest.mark.nightly
def test_the_script_asks_all_processes(demo: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", EXAMPLES / "1.3b" / "t2v" / "pretrain.sh", "--num-workers", "0"],
        env={
            **os.environ, "DOCTOR": "1", "NPUS_PER_NODE": "2", "PP": "2", "PRECISION": "fp32", "RECOMPUTE": "",
            "GRAD_ACC_STEP": "2", "MASTER_PORT": ANY_PORT, "SAVE_PATH": str(tmp_path / "run"),
            "MM_DATA": str(demo / "configs" / "feature_data.json"), "LOAD_PATH": str(demo / WEIGHTS),
            "MM_MODEL": str(demo / "configs" / "pretrain_model.json"),
        },
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 processes on 1 nodes joined" in done.stdout
    assert re.search(r"draws +ok +order, timesteps and noise of the first step are \w{16} on every rank", done.stdout)
    assert done.stdout.count("verdict: ready; 0 of ") == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_that_draws_otherwise_is_named(demo: Path) -> None:
    """Of four, with another seed on the third; and one that could not read."""
    data = load_train_data(demo / "configs" / "feature_data.json")
    dataset = open_features(
        features(data.dataset_param), load(PretrainModel, demo / "configs" / "pretrain_model.json").predictor.wan()
    )
    flow = FlowMatching(DiffusionConfig())
    batches = BatchPlan(8, 1)
    usual, other = (
        draws(dataset, sampling_plan(dataset, batches, Mixture(), seed, shuffle=True), flow, seed, 8) for seed in (1, 2)
    )
    (alike,) = same_draws([usual] * 4)
    assert (alike.verdict, usual in alike.found) == ("ok", True)
    (found,) = same_draws([usual, usual, other, None])
    assert (found.verdict, found.found) == (
        "no", f"ranks 2, 3 draw other samples, timesteps or noise than the rest ({other}, not {usual})",
    )  # fmt: skip
    assert same_draws([None, None]) == []


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("runs")
    for name, flags in {
        "a": {}, "b": {}, "seed": {"seed": 7}, "lr": {"lr": 2e-3}, "clip": {"clip_grad": 0.01},
    }.items():  # fmt: skip
        train_command.main([*words(demo, home / name, **flags), "--no-progress-bar"])
    return home


def test_equal_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["compare", str(runs / "a"), str(runs / "b" / "metrics.jsonl")])
    assert "equal, bit for bit, in all 4 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "equal", "step", "field"),
    [("seed", 0, 1, "timesteps"), ("lr", 0, 1, "lr"), ("clip", 1, 2, "sample_losses")],
)
def test_where_runs_part(runs: Path, other: str, equal: int, step: int, field: str) -> None:
    """Clipping changes no number of the first step that is written, and the weights of the second."""
    with pytest.raises(DifferenceError) as caught:
        doctor.main(["compare", str(runs / "a"), str(runs / other)])
    assert caught.value.id == "NUM-004"
    assert f"equal for {equal} steps and differ at step {step} in {field}: " in str(caught.value)


def test_compare_takes_two_runs(runs: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mm.cli.doctor", "compare", str(runs / "a")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 64
    assert "error CFG-006: mm doctor compare takes two runs" in done.stderr


@pytest.mark.nightly
def test_a_run_as_a_file_is_looked_at_like_its_flags(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(demo, tmp_path / "run")
    translate_command.main(["--", "mm", "train", *command])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)

    def dry_run(*asked: str) -> Any:
        doctor.main([*asked, "--dry-run", "--json-output"])
        return json.loads(capsys.readouterr().out)

    assert dry_run(str(file)) == dry_run(*command)
    doctor.main([str(file), "--json-output"])
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] and {row["check"] for row in found["findings"]} >= {"memory", "weights", "features"}
    with pytest.raises(ConfigError, match=r"CFG-190.*Write optimizer.lr into the file"):
        doctor.main([str(file), "--dry-run", "--lr", "1"])
    with pytest.raises(ConfigError, match=r"CFG-007.*--ranks"):
        doctor.main([str(file), "--dry-run", "--ranks", "1"])
