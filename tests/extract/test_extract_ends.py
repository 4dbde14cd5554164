"""Extraction that is started by torchrun, killed, interrupted, or left without a disk or a reader."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from extraction_runs import ROOT, edit, made, opened, run, times, words
from feature_samples import write_data_set
from feature_samples import write_extraction_files as write_files
from ranks import ANY_PORT
from store_content import content, is_finished, listed

from mm.data.store.writer import ShardWriter
from mm.extract.run import ExtractReport


def test_torchrun_starts_it(files: dict[str, Path], tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NPUS_PER_NODE": "2",
        "MASTER_PORT": ANY_PORT,
        "MM_DATA": str(files["mm_data"]),
        "MM_MODEL": str(files["mm_model"]),
        "MM_TOOL": str(files["mm_tool"]),
        "LOG_DIR": str(tmp_path / "logs"),
        "OMP_NUM_THREADS": "1",
    }
    script = ROOT / "examples/wan2.1/feature_extract/feature_extraction.sh"
    command = ["bash", str(script), "--device", "cpu", "--seed", "3"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(listed(tmp_path / "store")) == 5
    (log,) = (tmp_path / "logs").iterdir()
    assert "5 samples are listed" in log.read_text()
    failed = subprocess.run(
        [*command, "--no-such-flag"],
        env={**environment, "NPUS_PER_NODE": "1", "LOG_DIR": str(tmp_path / "failed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert failed.returncode == 64
    (log,) = (tmp_path / "failed").iterdir()
    assert "CFG-007" in log.read_text()


@pytest.mark.nightly
def test_killed_in_the_middle_it_goes_on(tmp_path: Path, weights: Path) -> None:
    rows = [{"path": f"{index}.mp4", "cap": "a red circle"} for index in range(40)]
    annotation = write_data_set(tmp_path / "set", rows, num_frames=9)
    files = write_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")
    store = tmp_path / "store"
    for wanted in (1, 17):
        process = subprocess.Popen([sys.executable, "-m", "mm.cli.extract", *words(files), "--seed", "3"], cwd=ROOT)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < 60 and made(store) < wanted:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not is_finished(store)
        assert wanted <= made(store) < 40
    (store / "shards" / ".tmp-left-behind").mkdir()
    complete = {path: path.stat().st_mtime_ns for path in (store / "shards").glob("0*/*.bin")}
    assert run(files) == ExtractReport(listed=40, encoded=40 - len(complete) // 2, reused=len(complete) // 2)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in complete.items())
    assert len(listed(store)) == 40 and len(times(store)) == 40
    dataset = opened(store, tmp_path)
    assert all(bool(torch.isfinite(dataset[index]["latents"]).all()) for index in range(40))


@pytest.mark.nightly
def test_ctrl_c_is_one_word_and_leaves_no_process(tmp_path: Path, weights: Path) -> None:
    rows = [{"path": f"{index}.mp4", "cap": "a red circle"} for index in range(40)]
    annotation = write_data_set(tmp_path / "set", rows, num_frames=9)
    files = write_files(tmp_path, weights, annotation, tmp_path / "set", tmp_path / "store")
    command = [sys.executable, "-m", "mm.cli.extract", *words(files), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    store = tmp_path / "store"
    while not made(store) and process.poll() is None:
        time.sleep(0.001)
    family = psutil.Process(process.pid).children(recursive=True)
    assert sum(map(is_reader, family)) == 2
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("error RUN-010: Ended by SIGINT. The features written so far stay")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert not list((store / "shards").glob(".tmp*")) and not list((store / "work").glob("claims/*"))
    assert not is_finished(store)


def test_a_reader_killed_for_its_memory_changes_nothing(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the kernel would, when the first sample is about to be written."""
    killed: list[int] = []

    def kill(*args: Any) -> Any:
        if not killed:
            killed.extend(child.pid for child in psutil.Process().children(recursive=True) if is_reader(child))
            for reader in killed:
                os.kill(reader, signal.SIGKILL)
        return add(*args)

    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", kill)
    assert run(files, num_workers=2).encoded == 5
    assert len(killed) == 2
    monkeypatch.undo()
    edit(files["mm_tool"], "sorafeature", "save_path", value=str(tmp_path / "again"))
    run(files)
    assert content(tmp_path / "store") == content(tmp_path / "again")


def is_reader(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and "forkserver" in " ".join(parent.cmdline())


@pytest.mark.nightly
def test_a_full_disk(files: dict[str, Path], tmp_path: Path) -> None:
    """On a file system of 20 KiB, which a private mount namespace makes possible without changing this machine's."""
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size=20k none '{disk}'"
    if subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True).returncode:
        pytest.skip("this machine allows no private mounts")
    edit(files["mm_tool"], "sorafeature", "save_path", value=str(disk / "store"))
    command = " ".join([sys.executable, "-m", "mm.cli.extract", *words(files), "--device", "cpu"])
    script = f"{inside} && {{ {command}; code=$?; find '{disk}' -name '.tmp*'; ls '{disk}'/store; exit $code; }}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 65, done.stderr
    assert "DATA-019" in done.stderr and str(disk / "store") in done.stderr
    assert ".tmp" not in done.stdout and "manifest.json" not in done.stdout and "recipe.json" in done.stdout
