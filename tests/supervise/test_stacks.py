"""Stacks of other threads, read while they run."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mm.supervise.stacks import read_stacks, where_is

TRAINS = """
import sys, threading, time
import torch
from mm.supervise.stacks import where_is

over, layers = threading.Event(), torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))

def deeper(calls):
    values = [torch.zeros(64) + number for number in range(3)]
    return deeper(calls - 1) if calls else values

def train():
    while not over.is_set():
        deeper(10)
        layers(torch.zeros(2, 8)).sum().backward()

sys.setswitchinterval(1e-6)  # the thread goes on between any two instructions of a look
thread = threading.Thread(target=train)
thread.start()
found, until = set(), time.monotonic() + 6
try:
    while time.monotonic() < until:
        found.add(where_is(thread.ident)[1])
finally:
    over.set()
    thread.join()
assert "" not in found, found
assert "deeper" in found, found
"""


@pytest.mark.nightly
def test_looks_at_a_thread_that_trains() -> None:
    """Walking the frames of `sys._current_frames()` instead ends here in a crash, or in objects that are no frames."""
    subprocess.run([sys.executable, "-c", TRAINS], check=True, timeout=60)


def test_a_stack_from_a_folder_with_letters_beyond_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`faulthandler` writes them as numbers."""
    folder = tmp_path / "josé 東"
    folder.mkdir()
    (folder / "sleeper.py").write_text("def ruhe_für(event, ready):\n    ready.set()\n    event.wait()\n")
    monkeypatch.syspath_prepend(str(folder))
    import sleeper  # type: ignore[import-not-found]  # written above

    over, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=sleeper.ruhe_für, args=(over, ready))
    thread.start()
    ready.wait()
    try:
        calls = read_stacks()[thread.ident or 0]
    finally:
        over.set()
        thread.join()
    assert (str(folder / "sleeper.py"), "ruhe_für") in [(call.file, call.function) for call in calls]


def test_a_thread_that_is_gone() -> None:
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()
    assert where_is(thread.ident or 0) == (False, "")
