"""`--initial-clip-ratio` and `--abnormal-clip-start`: the limits of a run, gone on with, recorded, and refused."""

from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, metrics, run

from mm.checkpoint.store import read_manifest
from mm.errors import ConfigError
from mm.optim.clipping import clip_limit
from mm.train.resuming import update_settings

STEPS, START, RATIO, NORM = 6, 3, 5.0, 0.05
FLAGS: dict[str, Any] = {
    "global_batch_size": 4, "clip_grad": NORM, "initial_clip_ratio": RATIO, "abnormal_clip_start": START,
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clipping") / "run"
    run(demo, folder, train_iters=STEPS, **FLAGS)
    return folder


def test_limits_of_the_steps_are_the_rule_s(straight: Path) -> None:
    """By hand: a line from 5 times the limit to the limit in three steps, and then less of what is far out."""
    rows = metrics(straight)
    for row in rows:
        before = row["step"] - 1
        if before <= START:
            assert row["clip_limit"] == pytest.approx(NORM * (RATIO + (1 - RATIO) * before / START), rel=1e-12)
        else:
            assert row["grad_norm"] > 5 * NORM
            assert row["clip_limit"] == pytest.approx(NORM / min(row["grad_norm"] / NORM, 10), rel=1e-12)
    assert len(rows) == STEPS


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(demo: Path, straight: Path, tmp_path: Path) -> None:
    for steps in (2, 5, STEPS):  # inside of the line, and behind it
        run(demo, tmp_path, train_iters=steps, **FLAGS)
    assert bits(metrics(tmp_path)) == bits(metrics(straight))
    shard = f"iter_{STEPS:07d}/shard-00000-of-00001.safetensors"
    assert (tmp_path / shard).read_bytes() == (straight / shard).read_bytes()


def test_a_checkpoint_records_the_rule_and_another_one_is_refused(demo: Path, straight: Path) -> None:
    recorded = read_manifest(straight / f"iter_{STEPS:07d}").scalars["steps"]["optimizer"]
    assert (recorded["initial_clip_ratio"], recorded["abnormal_clip_start"]) == (RATIO, START)
    with pytest.raises(ConfigError) as caught:
        run(demo, straight, train_iters=STEPS + 1, **{**FLAGS, "abnormal_clip_start": None, "initial_clip_ratio": None})
    assert [problem.id for problem in caught.value.problems] == ["CFG-160", "CFG-160"]
    assert "--abnormal-clip-start was 3 and is null" in str(caught.value)


def test_without_it_no_line_has_a_limit_and_no_record_a_rule(demo: Path, tmp_path: Path) -> None:
    (row,) = run(demo, tmp_path, train_iters=1)
    assert "clip_limit" not in row
    assert "abnormal_clip_start" not in read_manifest(tmp_path / "iter_0000001").scalars["steps"]["optimizer"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"initial_clip_ratio": 5.0}, "--initial-clip-ratio 5.0 has no effect without --abnormal-clip-start"),
        ({"abnormal_clip_start": 5, "clip_grad": 0.0}, "--abnormal-clip-start 5 has no effect with --clip-grad 0.0"),
    ],
)
def test_halves_of_it_are_refused(demo: Path, flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match="CFG-425") as caught:
        run(demo, None, train_iters=1, **flags)
    assert said in str(caught.value)


def test_a_limit_that_is_never_reached_clips_nothing(straight: Path) -> None:
    from mm.config.step import StepSettings

    steps = StepSettings.model_validate(read_manifest(straight / f"iter_{STEPS:07d}").scalars["steps"])
    settings = update_settings(steps)
    assert settings.abnormal_clip_samples == 4 * START
    assert clip_limit(settings, 4 * START, 1e9) == NORM, "VideoX-Fun's rule of gradients far out begins a step later"
    assert clip_limit(settings, 4 * START + 4, 1e9) == NORM / 10
    assert clip_limit(settings, 4 * START + 4, 5 * NORM) == NORM
