"""What runs of extraction start from."""

from pathlib import Path

import pytest
from extraction_runs import ROWS
from feature_samples import write_data_set, write_encoders
from feature_samples import write_extraction_files as write_files


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders that no test writes to."""
    return write_encoders(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def files(tmp_path: Path, weights: Path) -> dict[str, Path]:
    """A data set of five clips and the files that extract it to STORE."""
    annotation = write_data_set(tmp_path / "set", ROWS, num_frames=14)
    return write_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")
