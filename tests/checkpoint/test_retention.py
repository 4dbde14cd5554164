"""What is deleted and what never is; what is on disk before a checkpoint has its name; that thousands leave nothing."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from test_store import assert_holds, names, pieces_for

from mm.checkpoint.background import BackgroundSaver
from mm.checkpoint.comm import SingleProcess
from mm.checkpoint.fault import SAVE_POINTS
from mm.checkpoint.files import sync_folder
from mm.checkpoint.formats.mindspeed import write_stage
from mm.checkpoint.manifest import FileRecord
from mm.checkpoint.record import WeightsRecord, write_record
from mm.checkpoint.safetensor_file import hash_file
from mm.checkpoint.store import find_latest, save, writing
from mm.checkpoint.transaction import write_checkpoint

TRACKER = "latest_checkpointed_iteration.txt"


def save_mm(root, step, value, keep_latest=None):
    """A checkpoint in the MM format, of one tensor."""

    def write(folder):
        file = write_stage(folder, 0, 1, {"model": {"w": torch.full((3,), float(value))}, "iteration": step})
        sync_folder(file.parent)
        return FileRecord(num_bytes=file.stat().st_size, sha256=hash_file(file))

    def complete(folder, reports):
        files = {"mp_rank_00/model_optim_rng.pt": reports[0]}
        record = WeightsRecord(
            step=step, consumed_samples=step, skipped_steps=0, replaced_samples=0, seed=1, versions={}, files=files
        )
        write_record(folder, record)

    return write_checkpoint(root, step, 100, write, complete, SingleProcess(), keep_latest=keep_latest)


def save_store(root, step, value, keep_latest=None):
    return save(root, step, pieces_for(value), {}, keep_latest=keep_latest)


KINDS = {"store": save_store, "mm": save_mm}
every_kind = pytest.mark.parametrize("kind", KINDS)
TORN = {  # what an interrupted copy, a full disk or an edit can leave under a checkpoint's name
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no description": lambda folder: [path.unlink() for path in folder.rglob("m*.json")],
    "half a description": lambda folder: [path.write_text(path.read_text()[:-9]) for path in folder.rglob("m*.json")],
    "a file is shorter": lambda folder: [os.truncate(path, 9) for path in weight_files(folder)],
    "a file is gone": lambda folder: [path.unlink() for path in weight_files(folder)],
}


def weight_files(folder):
    return [*folder.glob("shard-*"), *folder.glob("mp_rank_*/*.pt")]


@every_kind
def test_five_torn_saves_never_push_a_whole_one_out(tmp_path, kind):
    """k = 2; the torn ones are newer than all but the last, each torn in another way, and each is passed over."""
    write = KINDS[kind]
    for step in (1, 2, 3):
        write(tmp_path, step, step, keep_latest=2)
    for step, tear in enumerate(TORN.values(), start=4):
        write(tmp_path, step, step)
        tear(tmp_path / f"iter_{step:07d}")
        assert find_latest(tmp_path) == tmp_path / "iter_0000003"
        with writing(tmp_path):
            assert find_latest(tmp_path) == tmp_path / "iter_0000003"
    write(tmp_path, 20, 20, keep_latest=2)
    assert find_latest(tmp_path, "strict") == tmp_path / "iter_0000020"
    assert not (tmp_path / "iter_0000002").exists()
    shutil.rmtree(tmp_path / "iter_0000020")
    (tmp_path / TRACKER).write_text("3")
    assert find_latest(tmp_path, verify="full") == tmp_path / "iter_0000003"


@every_kind
def test_a_tracker_edited_by_hand_is_followed_and_what_is_newer_stays(tmp_path, kind, caplog):
    write = KINDS[kind]
    for step in (1, 2, 3, 4):
        write(tmp_path, step, step)
    (tmp_path / TRACKER).write_text(" 2\n")
    with writing(tmp_path):  # which completes what a killed run had begun, and must not take this for it
        assert find_latest(tmp_path, "strict") == tmp_path / "iter_0000002"
        assert "going back to it" in caplog.text
        write(tmp_path, 3, 30, keep_latest=1)
    assert find_latest(tmp_path, "strict") == tmp_path / "iter_0000003"
    assert [name for name in names(tmp_path) if "iter" in name] == ["iter_0000003", "iter_0000004", TRACKER]
    if kind == "store":
        assert_holds(find_latest(tmp_path), 30)
    else:
        file = tmp_path / "iter_0000003/mp_rank_00/model_optim_rng.pt"
        assert torch.load(file, weights_only=True)["model"]["w"][0] == 30


def test_a_checkpoint_of_another_program_is_neither_counted_nor_deleted(tmp_path):
    """MindSpeed-MM's own saves have the same names and no description of ours."""
    foreign = tmp_path / "iter_0000001" / "mp_rank_00"
    foreign.mkdir(parents=True)
    (foreign / "model_optim_rng.pt").write_bytes(b"theirs")
    for step in (2, 3, 4):
        save(tmp_path, step, pieces_for(step), {}, keep_latest=2)
    assert [name for name in names(tmp_path) if "iter" in name] == [
        "iter_0000001", "iter_0000003", "iter_0000004", TRACKER,
    ]  # fmt: skip
    assert (foreign / "model_optim_rng.pt").read_bytes() == b"theirs"


@every_kind
def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch, kind):
    """Power may fail: files, then the folders that name them, then the rename, then the folder with the new name."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor):
        events.append(("on disk", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(self, target):
        folders = [str(self), *(str(path) for path in self.rglob("*"))] if self.is_dir() else []
        events.append(("named", str(self), str(target), folders))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", recorded_fsync)
        patch.setattr(Path, "rename", recorded_rename)
        KINDS[kind](tmp_path, 1, 1)
    [commit] = [event for event in events if event[0] == "named" and event[2].endswith("iter_0000001")]
    at = events.index(commit)
    before = {event[1]: place for place, event in enumerate(events[:at]) if event[0] == "on disk"}
    assert set(commit[3]) <= before.keys(), "something was named that is not on disk"
    for path in commit[3]:
        assert path == commit[1] or before[str(Path(path).parent)] > before[path], f"{path} is newer than its folder"
    after = [event[1] for event in events[at + 1 :] if event[0] == "on disk"]
    assert after[0] == str(tmp_path)  # the new name, before the tracker tells it
    assert (tmp_path / TRACKER).read_text() == "1"
    assert any("latest_checkpointed_iteration" in path for path in after[1:])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", [*KINDS, "in the background"])
def test_a_thousand_saves_leave_two_checkpoints_and_nothing_else(tmp_path, kind):
    with writing(tmp_path), BackgroundSaver(tmp_path, SingleProcess()) as saver:
        before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for step in range(1, 1001):
            if kind == "in the background":
                saver.start(step, pieces_for(step), {}, keep_latest=2)
            else:
                KINDS[kind](tmp_path, step, step, keep_latest=2)
        saver.finish()
        assert len(os.listdir("/proc/self/fd")) == before
        assert threading.active_count() == threads
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000999", "iter_0001000", TRACKER]
    assert find_latest(tmp_path, "strict", verify="full") == tmp_path / "iter_0001000"


MM_POINTS = [point for point in SAVE_POINTS if "shard" not in point and point != "save.derived_written"]
AFTER_COMMIT = SAVE_POINTS[SAVE_POINTS.index("save.committed") :]


@pytest.mark.parametrize("point", MM_POINTS)
def test_a_kill_loses_no_checkpoint_in_the_mm_format(tmp_path, point):
    """As `test_store_kill.py` has it for the sharded one."""
    save_mm(tmp_path, 1, 1)
    pid = os.fork()
    if pid == 0:  # nothing of pytest may run in the child
        try:
            os.environ["MM_FAULT"] = f"{point}:1:kill9"
            with writing(tmp_path):
                save_mm(tmp_path, 2, 2, keep_latest=1)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 9  # so the point was reached
    expected = f"iter_000000{2 if point in AFTER_COMMIT else 1}"
    assert find_latest(tmp_path, verify="full").name == expected
    with writing(tmp_path):
        assert find_latest(tmp_path, "strict", verify="full").name == expected
        save_mm(tmp_path, 3, 3, keep_latest=1)
    assert names(tmp_path) == ["iter_0000003", TRACKER]
