"""The smoke run: one step's end is no other's, what was found is on disk at once, and its steps work on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import smoke  # noqa: E402  (the path above)
from smoke_step import Found, Place, Step, found, require, skipped  # noqa: E402


def fine(place: Place) -> Found:
    return found("fine", number=3)


def absent(place: Place) -> Found:
    return skipped("needs CUDA")


def wrong(place: Place) -> Found:
    require(place.limit_s > 1e6, "the figure is 4\nand more")
    return found("")


def gone(place: Place) -> Found:
    os.kill(os.getpid(), signal.SIGSEGV)
    return found("")


def hanging(place: Place) -> Found:
    """With a process of its own, which must not outlive it."""
    child = subprocess.Popen(["sleep", "100"])
    (place.folder / "child").write_text(str(child.pid))
    time.sleep(100)
    return found("")


def run(folder: Path, *names: str, limit_s: float = 60) -> tuple[int, list[dict[str, Any]]]:
    steps = [Step(name, globals()[name], 3 if name == "hanging" else 30) for name in names]
    code = smoke.Smoke(steps, folder, folder / "smoke.json", "cpu", limit_s).run()
    return code, json.loads((folder / "smoke.json").read_text())["steps"]


def test_a_step_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, "wrong", "gone", "hanging", "absent", "fine")
    assert code == 1
    results = {row["step"]: (row["result"], row["text"]) for row in rows}
    assert results["wrong"] == ("failed", "AssertionError: the figure is 4")
    assert results["gone"][0] == "failed" and str(-signal.SIGSEGV) in results["gone"][1]
    assert results["hanging"] == ("timed out", "after 3 s")
    assert results["absent"] == ("skipped: needs CUDA", "")
    assert results["fine"] == ("ok", "fine") and rows[-1]["figures"] == {"number": 3}
    assert "3 of 5 steps failed: wrong, gone, hanging" in capsys.readouterr().out
    assert "the figure is 4" in (tmp_path / "smoke.logs" / "wrong.log").read_text()
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE  # nobody's any more


def test_without_a_failure_the_exit_code_is_0(tmp_path: Path) -> None:
    assert run(tmp_path, "fine", "absent")[0] == 0


def test_no_step_begins_when_time_is_up(tmp_path: Path) -> None:
    code, rows = run(tmp_path, "hanging", "fine", limit_s=2)
    assert (code, [row["result"] for row in rows]) == (1, ["timed out", "not run: no time left"])


def test_a_run_that_is_killed_leaves_what_it_had(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'benchmarks'), str(Path(__file__).parent)]}\n"
        "import test_smoke, pathlib\n"
        f"test_smoke.run(pathlib.Path({str(tmp_path)!r}), 'fine', 'absent', 'hanging', 'fine')\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "child").exists() and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
    rows = json.loads((tmp_path / "smoke.json").read_text())["steps"]
    assert [row["result"] for row in rows] == ["ok", "skipped: needs CUDA"]


def script(name: str, file: Path, *words: str, timeout_s: float) -> tuple[int, dict[str, dict[str, Any]], str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / name), "--json", str(file), "--device", "cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    rows = json.loads(file.read_text())["steps"] if file.exists() else []
    return done.returncode, {row["step"]: row for row in rows}, done.stdout + done.stderr


CHEAP = ["environment", "triton launch", "attention, 1.3B at 480p", "elementwise kernels, 14B at 720p",
         "waits of a step"]  # fmt: skip


@pytest.mark.nightly
def test_cheap_steps_on_the_cpu(tmp_path: Path) -> None:
    code, rows, told = script("smoke_accelerator.sh", tmp_path / "smoke.json", "--only", *CHEAP, "--patience", "5",
                              timeout_s=240)  # fmt: skip
    assert code == 0, told
    assert list(rows) == CHEAP
    assert rows["triton launch"]["result"] == "skipped: needs CUDA"
    assert rows["environment"]["figures"]["packages"]["torch"]
    assert rows["waits of a step"]["figures"]["waits"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smoke.json", "smoke.logs"]


def test_an_unknown_step_is_refused(tmp_path: Path) -> None:
    code, rows, told = script("smoke_accelerator.sh", tmp_path / "smoke.json", "--only", "lora", timeout_s=60)
    assert (code, rows) == (2, {}) and "no such step: lora" in told


@pytest.mark.nightly
def test_all_steps_on_the_cpu(tmp_path: Path) -> None:
    words = ["--patience", "6", "--limit-s", "1500"]
    code, rows, told = script("smoke_accelerator.sh", tmp_path / "smoke.json", *words, timeout_s=1600)
    assert code == 0, told
    assert list(rows) == [step.name for step in smoke.ONE]
    assert [name for name, row in rows.items() if row["result"] != "ok"] == ["triton launch"]


@pytest.mark.nightly
def test_two_processes_on_the_cpu(tmp_path: Path) -> None:
    words = ["--patience", "6", "--limit-s", "1500"]
    code, rows, told = script("smoke_two_devices.sh", tmp_path / "smoke.json", *words, timeout_s=1600)
    assert code == 0, told
    assert [row["result"] for row in rows.values()] == ["ok"] * len(smoke.TWO)
