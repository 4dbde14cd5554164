"""Runs `mm train` on the embedded default, in this process or on several."""

import json
from pathlib import Path
from typing import Any

from ranks import run_ranks

from mm.cli import train as train_command

WEIGHTS = "weights/Wan2.1-T2V-Tiny-Diffusers/transformer"


def words(demo: Path, save: Path | None, **flags: Any) -> list[str]:
    """A command line of `mm train`; flags override the defaults below, None leaves one out."""
    from mm.config.flags import as_words

    return as_words(
        {
            "mm_data": demo / "configs" / "feature_data.json",
            "mm_model": demo / "configs" / "pretrain_model.json",
            "load": demo / WEIGHTS,
            "save": save,
            "micro_batch_size": 4,
            "lr": 1e-3,
            "num_workers": 0,
            "no_progress_bar": True,
            **flags,
        }
    )


def run(demo: Path, save: Path | None, **flags: Any) -> list[dict[str, Any]]:
    """Train in this process; returns the lines of metrics.jsonl."""
    train_command.main(words(demo, save, **flags))
    return metrics(save) if save else []


def run_on(world_size: int, demo: Path, save: Path, **flags: Any) -> list[dict[str, Any]]:
    """Train on several processes."""
    run_ranks(world_size, train_command.main, words(demo, save, **flags))
    return metrics(save)


def metrics(save: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def bits(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What must be equal bit for bit between two runs."""
    return [(r["step"], r["loss_hex"], r["grad_norm_hex"], r["lr"], r["consumed_samples"]) for r in rows]
