"""`mm plot` on real runs: what is drawn is what the files say, whatever they lack."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_numerics import with_bad_sample
from training_runs import bits, run

from mm.cli import plot as plot_command
from mm.doctor.plot import bin_means, running_mean
from mm.errors import CheckpointError

PANELS = [
    "loss",
    "gradient norm",
    "learning rate",
    "tokens/s",
    "peak memory (GiB)",
    "loss of a sample",
    "held-out loss",
]


@pytest.fixture(scope="module")
def evaluated(demo_of_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps that are skipped, and with evaluations."""
    home, _ = with_bad_sample(demo_of_files, tmp_path_factory.mktemp("skipping") / "demo", 1e25)
    held_out = demo_of_files / "configs" / "feature_data.json"
    save = home / "run"
    run(home, save, train_iters=8, micro_batch_size=4, on_nonfinite="skip:1", eval_interval=4, eval_data=held_out)
    return save


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as matplotlib has them."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def draw(figures: list[Figure], save: Path) -> dict[str, Axes]:
    plot_command.main(["--run", str(save), "--out", str(save / "drawn.png")])
    assert (save / "drawn.png").read_bytes().startswith(b"\x89PNG")
    return {axis.get_ylabel(): axis for axis in figures[-1].axes}


def lines(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()}


def rows_of(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_losses_by_timestep_and_skipped_steps(evaluated: Path, figures: list[Figure]) -> None:
    rows, axes = rows_of(evaluated), draw(figures, evaluated)
    assert list(axes) == PANELS
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert skipped
    for panel in ("loss", "gradient norm"):
        assert lines(axes[panel])[f"{len(skipped)} skipped"][0] == skipped
    drawn = lines(axes["loss of a sample"])
    for half, label in ((rows[:4], "mean, first half of the run"), (rows[4:], "mean, last half (points: samples)")):
        samples = [(t, x) for row in half for t, x in zip(row["timesteps"], row["sample_losses"], strict=True)]
        finite = np.array([(t, x) for t, x in samples if x is not None])
        totals, edges = np.histogram(finite[:, 0], bins=10, range=(0, 1000), weights=finite[:, 1])
        counts, _ = np.histogram(finite[:, 0], bins=10, range=(0, 1000))
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(drawn[label][1], totals / counts)
        np.testing.assert_allclose(drawn[label][0], (edges[1:] + edges[:-1]) / 2)
    (points,) = [values for label, values in drawn.items() if not label.startswith("mean")]
    assert sorted(zip(*points, strict=True)) == sorted(map(tuple, finite.tolist()))


def test_first_and_last_evaluation(evaluated: Path, figures: list[Figure]) -> None:
    told = [json.loads(line) for line in (evaluated / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [4, 8]
    drawn = lines(draw(figures, evaluated)["held-out loss"])
    assert drawn == {
        f"step {line['step']}": ([float(t) for t in line["loss_at"]], list(line["loss_at"].values())) for line in told
    }


def test_files_of_older_runs(evaluated: Path, tmp_path: Path, figures: list[Figure]) -> None:
    """Without losses of samples, without evaluations, and without the mark of skipped steps."""
    older = [
        {name: value for name, value in row.items() if name not in ("timesteps", "sample_losses", "skipped")}
        for row in rows_of(evaluated)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in older))
    axes = draw(figures, tmp_path)
    assert list(axes) == PANELS[:5]
    assert len(lines(axes["loss"])) == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluation.jsonl"])
def test_a_damaged_file_is_refused_and_a_cut_one_is_not(evaluated: Path, tmp_path: Path, name: str) -> None:
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        (tmp_path / file).write_text((evaluated / file).read_text())
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text[:-9])
    plot_command.main([str(tmp_path)])
    (tmp_path / name).write_text(text[9:])
    with pytest.raises(CheckpointError, match=f"CKPT-070: {tmp_path / name} line 1 is damaged"):
        plot_command.main(["--run", str(tmp_path)])


@pytest.mark.nightly
def test_a_line_cut_off_by_a_kill_is_not_gone_on_with(demo: Path, tmp_path: Path) -> None:
    """Killed while it wrote the line of the step after its newest checkpoint: the next line must start a new one."""
    flags: dict[str, Any] = {"eval_interval": 1, "eval_data": demo / "configs" / "feature_data.json"}
    straight = run(demo, tmp_path / "straight", train_iters=3, **flags)
    run(demo, tmp_path / "killed", train_iters=2, **flags)
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        with (tmp_path / "killed" / name).open("a") as file:
            file.write((tmp_path / "straight" / name).read_text().splitlines()[2][:40])
    assert bits(run(demo, tmp_path / "killed", train_iters=3, **flags)) == bits(straight)
    evaluations = [(tmp_path / save / "evaluation.jsonl").read_text() for save in ("killed", "straight")]
    assert evaluations[0] == evaluations[1]


def test_means_leave_out_what_is_not_finite() -> None:
    nan, inf = math.nan, math.inf
    assert running_mean([1.0, nan, 3.0, inf, 8.0], 2) == [1.0, 1.0, 3.0, 3.0, 8.0]
    assert math.isnan(running_mean([nan], 3)[0])
    means = bin_means([(0.0, 1.0), (99.9, 3.0), (100.0, 5.0), (1000.0, 7.0), (950.0, nan)])
    assert means[:2] == [2.0, 5.0]
    assert means[9] == 7.0
    assert all(math.isnan(mean) for mean in means[2:9])
