"""Every benchmark of an accelerator runs to its end on the CPU with tiny shapes, and shows no times there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from programs import Forked, as_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "benchmarks" / "accelerator.py")
ROWS = {"a1": 1, "a2": 2, "a3": 1, "b1": 1, "b2": 2, "c1": 3, "d1": 4, "d2": 6, "d3": 4, "e1": 2}
LABELS = {"mode", "attention", "heads", "operator", "D", "GB", "direction"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    done = run("all", "--tiny", "--json", str(path))
    assert done.returncode == 0, done.stderr
    return {result["benchmark"].partition(":")[0]: result for result in json.loads(path.read_text())}


@pytest.mark.nightly
@pytest.mark.parametrize("name", ROWS)
def test_runs_and_shows_no_times(name: str, results: dict[str, Any]) -> None:
    found = results[name]
    assert len(found["rows"]) == ROWS[name]
    assert found["targets"] == []
    for row in found["rows"]:
        assert set(row) <= LABELS | {"bf16 - fp32", "result"}
        if row.get("attention") in (None, "mm.ops.attention.api", "torch, flash"):
            assert row["result"] == "ran"
    assert {"commit", "torch", "machine"} <= found["where"].keys()


def run_without_accelerator() -> None:
    os.environ.update(CUDA_VISIBLE_DEVICES="", ASCEND_RT_VISIBLE_DEVICES="")
    as_script(SCRIPT, "a1")


def test_without_an_accelerator_nothing_is_measured(tmp_path: Path) -> None:
    process = Forked(run_without_accelerator, folder=tmp_path, at=ROOT)
    assert process.wait() == 1
    assert "this process sees none" in process.said()
    assert process.said("stdout") == ""
