"""54 malformed inputs, each with the one outcome that docs/data.md gives it, in ten seconds, without a traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from feature_samples import write_encoders, write_extraction_files
from malformed import CONFIGS, FEATURES, GROUPS, METADATA, VIDEOS
from store_content import listed

from mm.cli import extract
from mm.cli.entry import run
from mm.errors import EXIT_CONFIG, EXIT_DATA
from mm.extract.skipping import FAULTS_OF_A_VIDEO

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (video|feature|metadata|configuration) \| ([^|]+) \| (?:`([A-Z]+-\d{3})`|taken)[^|]*\|$", re.M)
DOCUMENTED = {(group, name): id or None for group, name, id in ROW.findall((ROOT / "docs" / "data.md").read_text())}
Results = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("malformed")


@pytest.fixture(scope="module")
def results(home: Path) -> Results:
    """What every case gave, or the last one of a group that ended the process."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tests.parent}:{tests}", "OMP_NUM_THREADS": "1"}
    script = "import sys, malformed; malformed.run_groups(sys.argv[1], sys.argv[2:])"
    found: Results = {}
    left = list(GROUPS)
    while left:
        command = [sys.executable, "-c", script, str(home), *left]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        begun = set(left[:1])
        for line in done.stdout.splitlines():
            case = json.loads(line)
            begun.add(case["group"])
            found[case["group"], case["name"]] = {**case, "errors": done.stderr, "exit": done.returncode}
        left = [group for group in left if group not in begun]
    return found


def test_the_table_has_the_cases_and_no_others() -> None:
    cases = [(group, name) for group, (names, _) in GROUPS.items() for name in names]
    assert list(DOCUMENTED) == cases
    assert [len(VIDEOS), len(FEATURES), len(METADATA), len(CONFIGS)] == [22, 14, 12, 6] and len(cases) == 54


@pytest.mark.parametrize(("group", "name"), DOCUMENTED, ids=[f"{group}-{name}" for group, name in DOCUMENTED])
def test_outcome(group: str, name: str, results: Results) -> None:
    found, expected = results.get((group, name)), DOCUMENTED[group, name]
    assert found is not None, "an earlier case of the group ended the process"
    assert "code" in found, f"ended with {found['exit']} (-14: it took ten seconds): {found['errors'][-2000:]}"
    assert found["exit"] == 0 and "Traceback" not in found["errors"] + found["told"], found
    assert set(found["ids"]) - {"DATA-076"} == ({expected} if expected else set()), found
    wanted = 0 if expected is None else EXIT_CONFIG if expected.startswith("CFG") else EXIT_DATA
    assert found["code"] == wanted


def test_extraction_skips_what_is_documented_as_bad(results: Results, home: Path, tmp_path: Path) -> None:
    """All videos that may be skipped or are taken, in one data set, through the whole of `mm extract`."""
    usable = {
        name: number
        for number, name in enumerate(VIDEOS)
        if (id := DOCUMENTED["video", name]) is None or id in FAULTS_OF_A_VIDEO
        if name not in ("80 frames for 81", "permission denied")  # of another length; only for who obeys permissions
    }
    rows = [{"path": f"{number}/clip.mp4", "cap": name} for name, number in usable.items()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    weights = write_encoders(tmp_path / "weights")
    files = write_extraction_files(
        tmp_path, weights, tmp_path / "rows.json", home / "video", tmp_path / "store", num_frames=9
    )
    words = [word for name, path in files.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    assert run(extract.main, [*words, "--device", "cpu", "--on-bad-sample", "skip:max=90%"]) == 0
    good = [name for name in usable if DOCUMENTED["video", name] is None]
    assert [row["cap"] for row in listed(tmp_path / "store")] == good
    skipped = [json.loads(line) for line in (tmp_path / "store" / "skipped.jsonl").read_text().splitlines()]
    assert {row["sample"].split("/")[0]: row["error"] for row in skipped} == {
        str(number): DOCUMENTED["video", name] for name, number in usable.items() if DOCUMENTED["video", name]
    }
