"""Draws a run's metrics as one PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mm.train.metrics import METRICS_FILE, StepMetrics, read_metrics

matplotlib.use("Agg")

_PANELS = (
    ("loss", "loss", True),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", False),
    ("tokens_per_s", "tokens/s", False),
    ("peak_memory_gb", "peak memory (GB)", False),
)
_FROM_ZERO = ("tokens_per_s", "peak_memory_gb")  # a small change must not look like a large one


def plot_run(run: Path, target: Path) -> Path:
    """Draw loss, gradient norm, learning rate, throughput and memory over the steps of `run` into `target` (PNG).

    Raises:
        CheckpointError: CKPT-070 when the run has no readable metrics.jsonl.
    """
    rows = read_metrics(run / METRICS_FILE)
    steps = [row.step for row in rows]
    figure = Figure(figsize=(9, 2.2 * len(_PANELS)), layout="constrained")
    axes = figure.subplots(len(_PANELS), 1, sharex=True)
    for axis, (field, label, smoothed) in zip(axes, _PANELS, strict=True):
        values = [getattr(row, field) for row in rows]
        axis.plot(steps, values, linewidth=0.8, alpha=0.4 if smoothed else 1.0, color="tab:blue")
        if smoothed:
            axis.plot(steps, _running_mean(values), color="tab:blue", label=f"mean of {_window(rows)} steps")
            axis.legend(loc="upper right", fontsize="small")
        if field in _FROM_ZERO:
            axis.set_ylim(bottom=0)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.suptitle(str(run))
    figure.savefig(target, dpi=120)
    return target


def _window(rows: list[StepMetrics]) -> int:
    return max(1, len(rows) // 50)


def _running_mean(values: list[float]) -> list[float]:
    """Mean of each value and those before it inside the window."""
    window = max(1, len(values) // 50)
    return [sum(values[max(0, i - window + 1) : i + 1]) / (i + 1 - max(0, i - window + 1)) for i in range(len(values))]
