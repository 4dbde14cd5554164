"""Every benchmark finds what it imports: its command is what a figure of the documentation can be measured again by."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
IMPORT_ALL = """
import runpy, sys
from mm.cli.imports import large_imports
with large_imports():
    for path in sys.argv[1:]:
        before = list(sys.path)
        runpy.run_path(path, run_name="imported")
        sys.path[:] = before
        print(path)
"""


@pytest.mark.nightly
def test_every_benchmark_finds_what_it_imports() -> None:
    """In a process of its own: they look for modules of tests in places of their own. Nothing is measured."""
    paths = [str(path) for path in sorted(BENCHMARKS.glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *paths], capture_output=True, text=True, timeout=240, check=False,
        env={"PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1",
             "HOME": str(Path.home())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == paths and len(paths) > 30
