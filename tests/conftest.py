"""Shared by all tests. Its presence also puts tests/ on sys.path, so that tests import `ranks` and their helpers."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is wrong, and must fail at once


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """The folder of real clips with its data.json, where the machine has one."""
    folder = os.environ.get("MM_REAL_CLIPS")
    if not folder:
        pytest.skip("MM_REAL_CLIPS is not set; it names a folder with data.json and videos/")
    return Path(folder)
