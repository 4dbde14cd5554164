"""A store of shards, on disk and in object storage."""

import os
from pathlib import Path

import pytest
from object_storage import CREDENTIALS, S3
from shard_stores import SEED, random_shards, write_shards


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the tests' server alone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_shards(tmp_path / "s", random_shards(SEED))
    return tmp_path / "s"


@pytest.fixture
def url(s3: S3, store: Path, tmp_path: Path) -> str:
    """The same store in the bucket."""
    return s3.upload(store, f"{tmp_path.name}/store")
