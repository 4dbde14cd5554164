"""Numbers that are not finite: every rank decides alike, no weight changes, the report names what there is to name."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import metrics, run, run_on, words

from mm.cli import train as train_command
from mm.config.base import load
from mm.data.features import read_feature, read_header, write_feature
from mm.dialects.mindspeed.pretrain_json import PretrainModel
from mm.diffusion.flow import FlowMatching
from mm.errors import ConfigError, NumericsError

SEED = 1234


@pytest.fixture(scope="module")
def demo(demo_of_files: Path) -> Path:
    """Features of one file a sample, which can be changed one by one."""
    return demo_of_files


def with_bad_sample(demo: Path, home: Path, factor: float) -> tuple[Path, str]:
    """A copy of the demo in which one sample's latents are multiplied; finite, so that reading accepts them."""
    shutil.copytree(demo, home, symlinks=True)
    for path in (home / "configs").rglob("*"):
        if path.is_file():
            path.write_text(path.read_text().replace(str(demo), str(home)))
    file = sorted((home / "features").rglob("*.safetensors"))[5]
    model = load(PretrainModel, home / "configs" / "pretrain_model.json").predictor.wan()
    origin, feature = read_header(file).origin, read_feature(file, model)
    feature.latents.mul_(factor)
    write_feature(file, feature, origin, model.text_len)
    return home, origin.sample


@pytest.fixture(scope="module")
def overflowing(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return with_bad_sample(demo, tmp_path_factory.mktemp("overflowing") / "demo", 1e25)


def masters(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= {name: value for name, value in load_file(shard).items() if name.startswith("model.")}
    return found


def test_stops_and_names_the_sample(overflowing: tuple[Path, str], tmp_path: Path) -> None:
    home, bad = overflowing
    with pytest.raises(NumericsError) as caught:
        run(home, tmp_path / "run", train_iters=4, save_interval=1)
    assert caught.value.id == "NUM-001"
    assert caught.value.exit_code == 17
    rows = metrics(tmp_path / "run")
    assert f"The loss of step {len(rows) + 1} is" in str(caught.value)
    assert f"sample {bad} at timestep " in str(caught.value)
    (file,) = (tmp_path / "run" / "anomaly").iterdir()
    assert str(file) in str(caught.value)
    report = json.loads(file.read_text())
    (batch,) = report["micro_batches"]
    place = batch["samples"].index(bad)
    diffusion = load(PretrainModel, home / "configs" / "pretrain_model.json").diffusion
    _, timesteps, _ = FlowMatching(diffusion).draw_timesteps(SEED, batch["samples"], batch["draws"])
    assert batch["timesteps"] == timesteps.tolist()
    assert [isinstance(loss, str) for loss in batch["losses"]] == [index == place for index in range(4)]
    assert report["first_module_not_finite"] in str(caught.value)
    assert report["computed_again"] == "the same"
    assert report["losses_before"] == [row["loss"] for row in rows]
    assert set(report["parameters_not_finite"]) <= set(report["gradient_norms"])
    # what is on disk ends with the step before
    saved = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert saved == [f"iter_{row['step']:07d}" for row in rows]


OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="dp2", marks=pytest.mark.nightly),
        pytest.param({"pipeline_model_parallel_size": 2}, id="pp2"),
        pytest.param(OVERLAPPED, id="dp2-distributed-overlap"),
    ],
)
def test_two_processes_skip_alike(overflowing: tuple[Path, str], tmp_path: Path, layout: dict[str, Any]) -> None:
    home, bad = overflowing
    save = tmp_path / "run"
    flags = {"global_batch_size": 4, "micro_batch_size": 2, "on_nonfinite": "skip:1", "save_interval": 1, **layout}
    rows = run_on(2, home, save, train_iters=8, **flags)  # two epochs of the sixteen samples
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert len(skipped) == 2
    assert all(row["loss"] is None and row["grad_norm"] is None for row in rows if row["skipped"])
    for step in skipped:
        after, before = (masters(save / f"iter_{number:07d}") for number in (step, step - 1))
        assert all(torch.equal(after[name], value) for name, value in before.items())
        files = sorted((save / "anomaly").glob(f"step-{step:07d}-rank-*.json"))
        reports = [json.loads(file.read_text()) for file in files]
        samples = [name for batch in reports[0]["micro_batches"] for name in batch["samples"]]
        assert bad in samples
        assert [report["rank"] for report in reports] == ([0, 1] if "pipeline_model_parallel_size" in layout else [
            report["replica"] for report in reports])  # fmt: skip
        assert len(files) == (2 if "pipeline_model_parallel_size" in layout else 1)  # both stages of the one replica
    assert all(row["loss"] is not None for row in rows if not row["skipped"])
    state = json.loads((save / "iter_0000008" / "manifest.json").read_text())
    assert state["scalars"]["skipped_steps"] == 2
    resumed = run_on(2, home, save, train_iters=9, **flags)
    assert len(resumed) == 9


def test_more_in_a_row_than_allowed(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate that ruins the weights in one step: every loss after it is not finite."""
    with caplog.at_level(logging.WARNING), pytest.raises(NumericsError) as caught:
        run(demo, tmp_path / "run", train_iters=9, lr=1e30, clip_grad=0.0, on_nonfinite="skip:2")
    assert "It is number 3 in a row." in str(caught.value)
    told = [record.getMessage() for record in caplog.records if "The step is skipped" in record.getMessage()]
    assert [text.split("The step is skipped, ")[1] for text in told] == [
        "number 1 of at most 2 in a row, 1 in all",
        "number 2 of at most 2 in a row, 2 in all",
    ]


def test_spike_names_the_sample(demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    home, bad = with_bad_sample(demo, tmp_path / "demo", 30)
    with caplog.at_level(logging.WARNING):
        rows = run(home, tmp_path / "run", train_iters=56, micro_batch_size=1, lr=1e-6)
    spikes = [record.getMessage() for record in caplog.records if "loss spike" in record.getMessage()]
    worst = [row["step"] for row in rows[32:] if row["loss"] > 100]
    assert worst
    told = {int(text.split()[1]): text for text in spikes}
    assert all(f"the worst is sample {bad} at timestep" in told[step] for step in worst)
    assert not [text for step, text in told.items() if step not in worst and bad in text]


def test_policy_is_checked_before_torch(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train_command.main(words(demo, tmp_path / "run", train_iters=1, on_nonfinite="skip"))
    assert caught.value.id == "CFG-005"
    with pytest.raises(ConfigError) as caught:
        train_command.main(words(demo, tmp_path / "run", train_iters=1, check_replica_hash_interval=1))
    assert caught.value.id == "CFG-126"
