"""`diffusion.motion_loss_ratio` in a run: the loss that it adds, what a checkpoint records, and going on."""

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, metrics, run

from mm.checkpoint.store import read_manifest
from mm.errors import ConfigError

STEPS = 3
FLAGS: dict[str, Any] = {"global_batch_size": 4}


def model(demo: Path, folder: Path, ratio: float | None) -> Path:
    """pretrain_model.json of the embedded default, whose clips have three latent frames, with the loss of motion."""
    values = json.loads((demo / "configs" / "pretrain_model.json").read_text())
    values["diffusion"] |= {"loss_weighting": "none", "motion_loss_ratio": ratio}
    path = folder / f"model-{ratio}.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with it, stopped in the middle, and another that was not."""
    folder = tmp_path_factory.mktemp("motion")
    flags = {**FLAGS, "mm_model": model(demo, folder, 0.25)}
    run(demo, folder / "straight", train_iters=STEPS, **flags)
    for steps in (1, STEPS):
        run(demo, folder / "stopped", train_iters=steps, **flags)
    return folder


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(folder: Path) -> None:
    assert bits(metrics(folder / "stopped")) == bits(metrics(folder / "straight"))
    recorded = read_manifest(folder / "straight" / f"iter_{STEPS:07d}").scalars["steps"]["objective"]
    assert recorded["motion_loss_ratio"] == 0.25


def test_the_loss_lies_between_that_of_the_velocity_and_that_of_motion(demo: Path, folder: Path) -> None:
    """The first step's, of weights that are alike: 0.75 of the one and 0.25 of the other, sample by sample."""
    losses = {
        ratio: run(demo, folder / f"first {ratio}", train_iters=1, **FLAGS, mm_model=model(demo, folder, ratio))[0]
        for ratio in (None, 1.0)
    }
    plain, motion = (losses[ratio]["sample_losses"] for ratio in (None, 1.0))
    mixed = metrics(folder / "straight")[0]["sample_losses"]
    assert len(mixed) == 4
    assert mixed == pytest.approx([0.75 * a + 0.25 * b for a, b in zip(plain, motion, strict=True)], rel=1e-6)
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain, motion, strict=True))


def test_another_ratio_is_refused(demo: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"CFG-160.*motion_loss_ratio.* was 0.25 and is 0.5.*objective"):
        run(demo, folder / "straight", train_iters=STEPS + 1, **FLAGS, mm_model=model(demo, folder, 0.5))
