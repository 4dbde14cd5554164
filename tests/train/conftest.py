"""What several tests of training begin from."""

from pathlib import Path

import pytest
from training_runs import WEIGHTS, run

from mm.cli import convert as convert_command


@pytest.fixture(scope="session")
def base(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned something: in a new one the head is zero, and no gradient passes it."""
    folder = tmp_path_factory.mktemp("base")
    run(demo, folder / "run", train_iters=20)
    convert_command.main(["--mode", "convert_to_hf", "--source_path", str(folder / "run"),
                          "--target_path", str(folder / "hf"), "--ckpt_path", str(demo / WEIGHTS)])  # fmt: skip
    return folder / "hf"
