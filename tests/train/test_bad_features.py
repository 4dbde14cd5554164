"""Training past damaged features: the same losses on every layout and after a resume; the count is in checkpoints."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from training_runs import bits, run, run_on

from mm.checkpoint.store import read_manifest
from mm.errors import DataError

SKIP: dict[str, Any] = {
    "on_bad_sample": "skip:max=20%",
    "micro_batch_size": 2,
    "global_batch_size": 4,
}  # of 16: 3 an epoch


@pytest.fixture(scope="module")
def demo(demo_of_files: Path) -> Path:
    """Features of one file a sample, which can be damaged one by one."""
    return demo_of_files


@pytest.fixture
def damaged(demo: Path, tmp_path: Path) -> Path:
    """The embedded default with three damaged features."""
    home = Path(shutil.copytree(demo, tmp_path / "home"))
    for path in filter(Path.is_file, (home / "configs").rglob("*")):
        path.write_text(path.read_text().replace(str(demo), str(home)))
    for path in sorted((home / "features" / "features").glob("0*"))[4:7]:
        path.write_bytes(path.read_bytes()[:-1])
    return home


def replaced(save: Path) -> int:
    """The count in the newest checkpoint."""
    newest = max(path.parent for path in save.glob("*/manifest.json"))
    return int(read_manifest(newest).scalars["replaced_samples"])


def test_a_run_goes_on_past_damaged_features(damaged: Path, tmp_path: Path) -> None:
    whole = run(damaged, tmp_path / "a", train_iters=8, **SKIP)
    assert replaced(tmp_path / "a") == 6, "three in each of two epochs"
    run(damaged, tmp_path / "b", train_iters=3, **SKIP)
    assert bits(run(damaged, tmp_path / "b", train_iters=8, num_workers=2, **SKIP)) == bits(whole)
    assert replaced(tmp_path / "b") == 6


def test_replicas_and_ranks_of_a_replica_agree(damaged: Path, tmp_path: Path) -> None:
    alone = run(damaged, tmp_path / "a", train_iters=4, **SKIP)
    layouts: dict[str, dict[str, Any]] = {"dp": {}, "cp": {"context_parallel_size": 2}}
    for name, flags in layouts.items():
        rows = run_on(2, damaged, tmp_path / name, train_iters=4, **SKIP, **flags)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
        assert replaced(tmp_path / name) == 3


def test_one_too_many_stops_the_run(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA-074"):
        run(damaged, tmp_path / "a", train_iters=4, **{**SKIP, "on_bad_sample": "skip:max=13%"})


def test_fail_stops_at_the_first(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA-011"):
        run(damaged, tmp_path / "a", train_iters=4, **{**SKIP, "on_bad_sample": "fail"})
