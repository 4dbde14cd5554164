"""The mean beside a step's loss: of the last hundred losses, the same after a resume, in every place that shows it."""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
from training_runs import metrics, run

from mm.train.records import StepMetrics, drop_repeated_steps, read_metrics
from mm.train.running_mean import RunningMean
from mm.train.sinks.base import opened
from mm.train.sinks.console import Console
from mm.train.sinks.json_lines import JsonLines

STEPS = 130
LOSSES = [math.nan if step in (7, 90) else 1 + math.sin(step) / (1 + step) for step in range(1, STEPS + 1)]


def row(step: int) -> StepMetrics:
    loss = LOSSES[step - 1]
    return StepMetrics(step, loss, loss.hex(), 1.0, "0x1p0", 1e-3, step, 1.0, 1.0, 1.0, 1.0)


def write(folder: Path, steps: range) -> None:
    recent = RunningMean(float.fromhex(row.loss_hex) for row in drop_repeated_steps(folder, steps[0]))
    with opened([JsonLines(folder), Console(1, progress_bar=False)], steps[0], STEPS) as log:
        for step in steps:
            log([row(step).with_mean(recent)])


def expected(step: int) -> float:
    return fmean([loss for loss in LOSSES[:step] if math.isfinite(loss)][-100:])


def test_the_mean_is_of_the_last_hundred_and_a_resume_does_not_change_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write(tmp_path / "straight", range(1, STEPS + 1))
    means = [row.loss_mean for row in read_metrics(tmp_path / "straight" / "metrics.jsonl")]
    assert means == pytest.approx([expected(step) for step in range(1, STEPS + 1)], rel=1e-12)
    assert f"loss {LOSSES[-1]:.4f} (mean of 100: {expected(STEPS):.4f}) | grad norm" in caplog.text
    assert f"loss {LOSSES[2]:.4f} (mean of 3: {expected(3):.4f}) | grad norm" in caplog.text
    write(tmp_path / "stopped", range(1, 61))
    write(tmp_path / "stopped", range(51, STEPS + 1))  # killed after step 60, whose last checkpoint was of step 50
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("straight", "stopped")]
    assert files[0] == files[1]


def test_a_first_loss_that_is_not_finite_has_no_mean(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    metrics = StepMetrics(1, math.nan, "nan", math.nan, "nan", 1e-3, 1, 1.0, 1.0, 1.0, 1.0, skipped=True)
    with opened([JsonLines(tmp_path), Console(1, progress_bar=False)], 1, 1) as log:
        log([metrics.with_mean(RunningMean())])
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss_mean"] is None
    assert "loss nan | grad norm" in caplog.text


def test_lines_of_earlier_versions_are_read(tmp_path: Path) -> None:
    line = json.loads(row(1).as_json())
    assert line.pop("loss_mean") is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write(tmp_path, range(2, 4))
    assert read_metrics(tmp_path / "metrics.jsonl")[-1].loss_mean == pytest.approx(expected(3))


def test_a_run_and_its_resume(demo: Path, tmp_path: Path) -> None:
    run(demo, tmp_path, train_iters=2)
    run(demo, tmp_path, train_iters=4)
    rows = metrics(tmp_path)
    losses = [float.fromhex(line["loss_hex"]) for line in rows]
    assert [line["loss_mean"] for line in rows] == pytest.approx([fmean(losses[:n]) for n in (1, 2, 3, 4)], rel=1e-12)
