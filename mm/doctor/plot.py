"""Draws a run's metrics as one PNG: over its steps, and over the timesteps that it drew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mm.config.run.file import load_run
from mm.config.run.origins import RUN_FILE
from mm.config.run.training import TrainingRun
from mm.config.unread import if_read, read_or
from mm.demo.sheet import write_png
from mm.train.records import (
    EVALUATION_FILE,
    METRICS_FILE,
    StepEvaluation,
    StepMetrics,
    read_evaluations,
    read_metrics,
)

matplotlib.use("Agg")

_PANELS = (
    ("loss", "loss", True),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", False),
    ("tokens_per_s", "tokens/s", False),
    ("peak_memory_gib", "peak memory (GiB)", False),
)
_FROM_ZERO = ("tokens_per_s", "peak_memory_gib")  # a small change must not look like a large one
_BINS, _LARGEST_TIMESTEP = 10, 1000.0
_EARLY, _LATE = "tab:orange", "tab:blue"

Sample = tuple[float, float]
"""A timestep and the loss of a sample at it."""


def plot_run(run: Path, target: Path) -> Path:
    """Draw what `run` has told so far into `target` (PNG).

    Over the steps: loss, gradient norm, learning rate, throughput and memory, with the skipped steps marked. Over the
    timesteps: the losses of the first replica's samples, where metrics.jsonl has them, and the first and the last loss
    on held-out features, where there is an evaluation.jsonl; of a run of two experts with the boundary between them.

    Raises:
        CheckpointError: CKPT-070 when the run has no readable metrics.jsonl, or a damaged evaluation.jsonl.
        DataError: DATA-018 or DATA-019 when the PNG cannot be written.
    """
    rows = read_metrics(run / METRICS_FILE)
    evaluations = read_evaluations(run / EVALUATION_FILE) if (run / EVALUATION_FILE).exists() else []
    has_samples = any(row.timesteps for row in rows)
    num_panels = len(_PANELS) + has_samples + bool(evaluations)
    figure = Figure(figsize=(9, 2.2 * num_panels), layout="constrained")
    axes = list(figure.subplots(num_panels, 1))
    _draw_steps(axes[: len(_PANELS)], rows)
    rest = axes[len(_PANELS) :]
    if has_samples:
        _draw_samples(rest[0], rows)
    if evaluations:
        _draw_evaluations(rest[-1], evaluations)
    for axis in axes:
        axis.grid(alpha=0.3)
    boundary = expert_boundary(run)
    for axis in rest:
        if boundary is not None:
            axis.axvline(boundary * _LARGEST_TIMESTEP, color="tab:gray", linestyle="--", label="between the experts")
            axis.legend(loc="upper center", fontsize="small")
        axis.set_xlim(0, _LARGEST_TIMESTEP)
        axis.set_xlabel("timestep")
    figure.suptitle(str(run))
    write_png(figure, target, dpi=120)
    return target


def expert_boundary(run: Path) -> float | None:
    """Noise level between the experts of a run, as its run.yaml has it; None where that tells of none."""
    file = run / RUN_FILE
    told = load_run(file) if file.is_file() else None
    if not isinstance(told, TrainingRun):
        return None
    boundary = read_or(if_read(lambda: None if told.experts is None else told.experts.boundary), None)
    return None if boundary is None else float(boundary)


def bin_means(samples: Sequence[Sample]) -> list[float]:
    """The mean loss in each of ten equal parts of the timesteps 0 to 1000; NaN where a part has no sample.

    A sample whose loss is not finite is left out: it was of a skipped step.
    """
    bins: list[list[float]] = [[] for _ in range(_BINS)]
    for timestep, loss in samples:
        if math.isfinite(loss):
            bins[min(int(timestep * _BINS / _LARGEST_TIMESTEP), _BINS - 1)].append(loss)
    return [fmean(losses) if losses else math.nan for losses in bins]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the finite ones among each value and those before it inside the window; NaN where there is none."""
    windows = ([v for v in values[max(0, i - window + 1) : i + 1] if math.isfinite(v)] for i in range(len(values)))
    return [fmean(finite) if finite else math.nan for finite in windows]


def _draw_steps(axes: Sequence[Axes], rows: Sequence[StepMetrics]) -> None:
    steps, window = [row.step for row in rows], max(1, len(rows) // 50)
    skipped = [row.step for row in rows if row.skipped]
    for axis, (field, label, smoothed) in zip(axes, _PANELS, strict=True):
        values = [getattr(row, field) for row in rows]
        axis.plot(steps, values, linewidth=0.8, alpha=0.4 if smoothed else 1.0, color="tab:blue")
        if smoothed:
            axis.plot(steps, running_mean(values, window), color="tab:blue", label=f"mean of {window} steps")
            if skipped:  # at the foot of the panel: such a step has no finite value to stand at
                foot = axis.get_xaxis_transform()
                axis.plot(
                    skipped,
                    [0.04] * len(skipped),
                    "x",
                    color="tab:red",
                    transform=foot,
                    label=f"{len(skipped)} skipped",
                )
            axis.legend(loc="upper right", fontsize="small")
        if field in _FROM_ZERO:
            axis.set_ylim(0, 1.1 * max(values, default=1.0))
        axis.set_ylabel(label)
        axis.sharex(axes[0])
        axis.label_outer()
    axes[-1].tick_params(labelbottom=True)
    axes[-1].set_xlabel("step")


def _draw_samples(axis: Axes, rows: Sequence[StepMetrics]) -> None:
    """Losses by timestep: the late half of the run as points, both halves as means."""
    middle = (rows[0].step + rows[-1].step) / 2
    early, late = (
        [pair for row in half for pair in zip(row.timesteps, row.sample_losses, strict=True)]
        for half in ([row for row in rows if row.step <= middle], [row for row in rows if row.step > middle])
    )
    points = [(timestep, loss) for timestep, loss in late if math.isfinite(loss)]
    axis.plot([t for t, _ in points], [loss for _, loss in points], ".", markersize=3, alpha=0.5, color=_LATE)
    centres = [(i + 0.5) * _LARGEST_TIMESTEP / _BINS for i in range(_BINS)]
    axis.plot(centres, bin_means(early), ".-", color=_EARLY, label="mean, first half of the run")
    axis.plot(centres, bin_means(late), ".-", color=_LATE, label="mean, last half (points: samples)")
    axis.set_ylabel("loss of a sample")
    axis.legend(loc="upper center", fontsize="small")  # where losses are low


def _draw_evaluations(axis: Axes, evaluations: Sequence[StepEvaluation]) -> None:
    """Losses on held-out features by timestep. They are not weighted, so they have a panel of their own."""
    first, last = evaluations[0], evaluations[-1]
    for evaluation, colour in [(first, _EARLY), (last, _LATE)] if last.step != first.step else [(last, _LATE)]:
        points = list(evaluation.loss_at), list(evaluation.loss_at.values())
        axis.plot(*points, ".-", color=colour, label=f"step {evaluation.step}")
    axis.set_ylabel("held-out loss")
    axis.legend(loc="upper center", fontsize="small")  # where losses are low
