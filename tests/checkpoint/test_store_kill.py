"""`kill -9`, an unexpected exception and a full disk at every step of the commit protocol."""

import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest
from test_store import assert_holds, names, pieces_for

from mm.checkpoint import fault
from mm.checkpoint.fault import REPLACE_POINTS, SAVE_POINTS, FaultInjected
from mm.checkpoint.store import find_latest, save, writing
from mm.errors import CheckpointError, ConfigError

AFTER_COMMIT = SAVE_POINTS[SAVE_POINTS.index("save.committed") :]


@pytest.fixture(scope="module")
def processes():
    """Children are forked from a server that has imported everything, so each costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm.checkpoint.store", "test_store_kill"])
    return context


def save_under_fault(root, step, value, setting):
    os.environ["MM_FAULT"] = setting
    with writing(Path(root)):
        save(Path(root), step, pieces_for(value), {}, keep_latest=1)


def run_child(processes, *arguments):
    child = processes.Process(target=save_under_fault, args=arguments)
    child.start()
    child.join(30)
    return child.exitcode


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_a_kill_loses_no_committed_checkpoint(tmp_path, processes, point):
    save(tmp_path, 1, pieces_for(1), {}, keep_latest=1)
    assert run_child(processes, str(tmp_path), 2, 2, f"{point}:1:kill9") == -9  # so the point was reached
    assert_goes_on(tmp_path, 2 if point in AFTER_COMMIT else 1)


@pytest.mark.parametrize("action", ["raise", "enospc"])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_an_error_loses_no_committed_checkpoint_and_leaves_nothing(tmp_path, monkeypatch, point, action):
    save(tmp_path, 1, pieces_for(1), {}, keep_latest=1)
    with monkeypatch.context() as patch:
        patch.setenv("MM_FAULT", f"{point}:1:{action}")
        patch.setattr(fault, "_passed", Counter())
        with pytest.raises((FaultInjected, OSError, CheckpointError)) as caught, writing(tmp_path):
            save(tmp_path, 2, pieces_for(2), {}, keep_latest=1)
    if isinstance(caught.value, CheckpointError):
        assert caught.value.id == "CKPT-031"
    assert not list(tmp_path.glob(".tmp-*"))
    assert_goes_on(tmp_path, 2 if point in AFTER_COMMIT else 1)


def assert_goes_on(root, expected):
    """The expected checkpoint is found and whole; the next run cleans up and saves."""
    assert find_latest(root).name == f"iter_000000{expected}"
    assert_holds(find_latest(root), expected)
    with writing(root):
        assert not [name for name in names(root) if name.startswith((".tmp", ".trash"))]
        assert_holds(find_latest(root, "strict"), expected)
        save(root, 3, pieces_for(3), {}, keep_latest=1)
    assert names(root) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def test_an_unknown_fault_is_refused(tmp_path, monkeypatch):
    for setting in ("save.nowhere:1:kill9", "save.start:x:kill9", "save.start:1:explode", "save.start"):
        monkeypatch.setenv("MM_FAULT", setting)
        with pytest.raises(ConfigError) as caught:
            save(tmp_path, 1, pieces_for(1), {})
        assert caught.value.id == "CFG-079"


@pytest.mark.parametrize("point", [*SAVE_POINTS, *REPLACE_POINTS])
def test_a_step_saved_again_is_the_old_or_the_new_one(tmp_path, processes, point):
    save(tmp_path, 1, pieces_for(1), {})
    exit_code = run_child(processes, str(tmp_path), 1, 2, f"{point}:1:kill9")
    assert exit_code == -9
    assert_holds(find_latest(tmp_path), 2 if point in AFTER_COMMIT else 1)
    with writing(tmp_path):
        save(tmp_path, 1, pieces_for(3), {})
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert_holds(find_latest(tmp_path), 3)


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_a_kill_in_the_very_first_save(tmp_path, processes, point):
    exit_code = run_child(processes, str(tmp_path), 1, 1, f"{point}:1:kill9")
    latest = find_latest(tmp_path)
    if point == "save.trashed":  # there was nothing to delete
        assert exit_code == 0
    else:
        assert exit_code == -9
    if point in AFTER_COMMIT:
        assert_holds(latest, 1)
    else:
        assert latest is None
