"""Who may write into a folder: owners that live, are dead, are stopped, are on another node or in another container."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mm.checkpoint.lock import LOCK_NAME, Times, holder_of, locked
from mm.checkpoint.store import find_latest, save, whole_piece, writing
from mm.errors import CheckpointError

REPO = Path(__file__).parents[2]
QUICK = Times(beat_s=0.05, stale_s=1.0)
UNSEEN = Times(beat_s=0.05, stale_s=1.0, flock=False)  # as on two nodes, which see no flock of each other
HOLD = """
import sys
from pathlib import Path
from mm.checkpoint.lock import Times, locked
with locked(Path(sys.argv[1]), Times(*map(float, sys.argv[2:4]), flock=sys.argv[4] == "True")):
    print("held", flush=True)
    sys.stdin.read()
"""
SAVE = """
import sys
from pathlib import Path
import torch
from mm.checkpoint.lock import Times
from mm.checkpoint.store import Derived, save, whole_piece, writing
from mm.errors import MMError
def pause(folder, manifest):
    if sys.argv[2] == "while writing":
        print("writing", flush=True)
        sys.stdin.readline()
try:
    with writing(Path(sys.argv[1]), times=Times(0.05, 1.0, flock=False)) as lock:
        for step in (1, 2):
            late = Derived(pause, 0) if step == 2 else None
            save(Path(sys.argv[1]), step, [whole_piece("w", torch.ones(4))], {}, derived=late, lock=lock)
            if sys.argv[2] == "between saves":
                print("saved", flush=True)
                sys.stdin.readline()
                lock.require()
except MMError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def environment():
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def start(code, *words, prefix=()):
    """A process that has come to its first printed line."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout.readline()
    return process


def hold(folder, times=QUICK, prefix=()):
    return start(HOLD, folder, times.beat_s, times.stale_s, times.flock, prefix=prefix)


def end(process):
    process.kill()
    process.communicate()


def edit(folder, **values):
    """Change what a lock says, in place: it goes on being the same file."""
    path = folder / LOCK_NAME
    holder = {**json.loads(path.read_text()), **values}
    with path.open("r+") as file:
        file.write(json.dumps(holder))
        file.truncate()


def refused(folder, times=QUICK):
    with pytest.raises(CheckpointError) as caught, locked(folder, times):
        pass
    assert caught.value.id == "CKPT-034"
    return str(caught.value)


def test_a_living_owner_is_known_by_the_kernel_whatever_it_is_called(tmp_path):
    owner = hold(tmp_path, Times())  # beats too seldom to undo what is written here
    try:
        for values in ({"pid": 2**22 + 1}, {"host": "elsewhere"}, {"boot": "another kernel"}):
            edit(tmp_path, **values)
            began = time.monotonic()
            assert "by itself" in refused(tmp_path)
            assert time.monotonic() - began < QUICK.stale_s  # nothing had to be watched
        os.kill(owner.pid, signal.SIGSTOP)  # a stopped owner may go on
        assert "by itself" in refused(tmp_path)
    finally:
        end(owner)


def test_a_dead_owner_is_known_at_once_under_another_host_name(tmp_path, caplog):
    end(hold(tmp_path))
    edit(tmp_path, host="node-that-failed", pid=os.getpid())
    began = time.monotonic()
    with locked(tmp_path, Times()):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 10  # Times() would watch a heartbeat for a minute
    assert "on node-that-failed held the lock" in caplog.text and "taking it over" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_node_is_taken_over_when_its_heartbeat_stands_still(tmp_path, caplog):
    end(hold(tmp_path))
    edit(tmp_path, host="node-that-failed", boot="another kernel")
    began = time.monotonic()
    with locked(tmp_path, QUICK):
        assert time.monotonic() - began >= QUICK.stale_s
    assert "watching its heartbeat" in caplog.text and "taking it over" in caplog.text


def test_a_heartbeat_that_beats_is_respected_whatever_its_clock_says(tmp_path):
    owner = hold(tmp_path, UNSEEN)
    try:
        assert "another" not in refused(tmp_path, UNSEEN)
        path = tmp_path / LOCK_NAME
        os.utime(path, (0, 0))
        refused(tmp_path, UNSEEN)
        assert json.loads(path.read_text())["flock"] is False
    finally:
        end(owner)


@pytest.mark.parametrize("when", ["between saves", "while writing"])
def test_an_owner_that_was_stopped_and_taken_for_dead_writes_nothing_more(when, tmp_path):
    owner = start(SAVE, tmp_path, when)
    try:
        os.kill(owner.pid, signal.SIGSTOP)
        with writing(tmp_path, times=UNSEEN) as lock:
            save(tmp_path, 2, [whole_piece("w", torch.zeros(4))], {"whose": "the second"}, lock=lock)
            before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.name != LOCK_NAME}
            os.kill(owner.pid, signal.SIGCONT)
            said, _ = owner.communicate("\n", timeout=60)
            assert owner.returncode == 74 and said.count("CKPT-100") == 1, said
            assert f"process {os.getpid()} on " in said
            after = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.name != LOCK_NAME}
            assert {path.name for path in after} == {path.name for path in before}
            files = [path for path in before if path.is_file()]
            assert [after[path] for path in files] == [before[path] for path in files]
            assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
        assert find_latest(tmp_path) == tmp_path / "iter_0000002"
    finally:
        end(owner)


def test_locks_of_earlier_versions(tmp_path):
    """They have no heartbeat: a process of this host is looked for, another host's lock is a person's to delete."""
    path = tmp_path / LOCK_NAME
    old = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": None}
    for holder, is_held in (
        (old, False),
        ({**old, "pid": os.getpid(), "started": "an earlier process of this number"}, False),
        ({**old, "host": "elsewhere"}, True),
    ):
        path.write_text(json.dumps(holder))
        assert (holder_of(tmp_path) is not None) == is_held
        if is_held:
            assert f"delete {path}" in refused(tmp_path)
            path.unlink()
        else:
            with locked(tmp_path, QUICK):
                pass
    path.write_text("")
    assert f"delete {path}" in refused(tmp_path)


def test_who_holds_a_folder_is_told_without_touching_it(tmp_path):
    assert holder_of(tmp_path) is None
    owner = hold(tmp_path)
    try:
        assert holder_of(tmp_path) == f"process {owner.pid} on {os.uname().nodename}"
    finally:
        end(owner)
    assert holder_of(tmp_path) is None and (tmp_path / LOCK_NAME).exists()


RACE = """
import sys, time
from pathlib import Path
from mm.checkpoint.lock import Times, locked
from mm.errors import CheckpointError
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(4):
    try:
        with locked(folder, Times(0.05, 0.5, flock=sys.argv[2] == "True")):
            with (folder.parent / "turns").open("a") as turns:
                turns.write("in\\n"); turns.flush()
                time.sleep(0.02)
                turns.write("out\\n")
    except CheckpointError as error:
        assert error.id == "CKPT-034", error
"""


@pytest.mark.parametrize("flock", [True, False])
def test_of_many_that_find_a_dead_lock_one_holds_it_at_a_time(flock, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    end(hold(folder))
    edit(folder, boot="another kernel")
    others = [start(RACE, folder, flock) for _ in range(4)]
    for process in others:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(60) for process in others] == [0] * 4
    turns = (tmp_path / "turns").read_text().split()
    assert turns == ["in", "out"] * (len(turns) // 2) and turns
    for process in others:
        end(process)
    assert not (folder / LOCK_NAME).exists()


def namespace(*flags):
    """The words that put a command into namespaces of its own, as containers have them."""
    words = ["unshare", *flags, "--kill-child"]
    if shutil.which("unshare") is None or subprocess.run([*words, "-f", "true"], capture_output=True).returncode:
        pytest.skip("namespaces need root and unshare")
    return words


def test_two_containers_of_one_host_name(tmp_path):
    own_processes = namespace("-p", "-f", "--mount-proc")
    owner = hold(tmp_path, Times(), prefix=own_processes)
    try:
        for prefix in (own_processes, [*namespace("-p", "-u", "-f", "--mount-proc")]):
            other = subprocess.run(
                [*prefix, sys.executable, "-c", HOLD, tmp_path, "0.05", "1", "True"],
                capture_output=True, text=True, env=environment(), stdin=subprocess.DEVNULL, timeout=60,
            )  # fmt: skip
            assert "CKPT-034" in other.stderr and "held" not in other.stdout
    finally:
        end(owner)


def test_a_job_that_is_put_back_into_the_queue_goes_on_in_another_container(tmp_path):
    words = namespace("-u", "-p", "-f", "--mount-proc")
    failed = hold(tmp_path, Times(), prefix=[*words, "bash", "-c", 'hostname nodeA && exec "$0" "$@"'])
    assert "on nodeA" in refused(tmp_path)
    end(failed)
    deadline = time.monotonic() + 20
    while holder_of(tmp_path) is not None and time.monotonic() < deadline:
        time.sleep(0.1)  # until the namespace is gone
    with locked(tmp_path, Times()):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["host"] == os.uname().nodename
