"""Which checkpoint is the latest, when files are damaged, missing, or edited by the user."""

import json
import logging

import pytest
from test_store import assert_holds, pieces_for

from mm.checkpoint.store import find_latest, read_manifest, save
from mm.errors import CheckpointError

SHARD = "shard-00000-of-00001.safetensors"
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def root(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, pieces_for(step), {})
    return tmp_path


def flip_a_byte(folder):
    data = bytearray((folder / SHARD).read_bytes())
    data[-3] ^= 1
    (folder / SHARD).write_bytes(data)


def edit_manifest(folder, edit):
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


DAMAGES = {
    "byte flipped": flip_a_byte,
    "shard truncated": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
    "shard deleted": lambda f: (f / SHARD).unlink(),
    "manifest empty": lambda f: (f / "manifest.json").write_text(""),
    "manifest deleted": lambda f: (f / "manifest.json").unlink(),
    "manifest is a list": lambda f: (f / "manifest.json").write_text("[]"),
    "later schema": lambda f: edit_manifest(f, lambda m: m.update(schema_version=2)),
    "path escape": lambda f: edit_manifest(f, lambda m: m["tensors"]["model.w"]["pieces"][0].update(file="../x")),
    "unlisted file": lambda f: edit_manifest(
        f, lambda m: m["tensors"]["model.w"]["pieces"][0].update(file="shard-00003-of-00004.safetensors")
    ),
    "piece missing": lambda f: edit_manifest(f, lambda m: m["tensors"]["model.w"].update(pieces=[])),
    "negative size": lambda f: edit_manifest(f, lambda m: m["tensors"]["model.w"]["pieces"][0].update(sizes=[-3, -4])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_gives_way_to_the_one_before(root, damage, caplog):
    DAMAGES[damage](root / "iter_0000002")
    with caplog.at_level(logging.WARNING):
        assert find_latest(root, verify="full") == root / "iter_0000001"
    assert "iter_0000002" in caplog.text
    with pytest.raises(CheckpointError) as caught:
        find_latest(root, "strict", verify="full")
    assert caught.value.id == "CKPT-013"
    assert "iter_0000002" in str(caught.value)


def test_no_complete_checkpoint_is_an_error_and_never_a_fresh_start(root):
    for step in (1, 2):
        (root / f"iter_000000{step}" / "manifest.json").write_text("")
    with pytest.raises(CheckpointError) as caught:
        find_latest(root)
    assert caught.value.id == "CKPT-013"
    assert caught.value.exit_code == 74


def test_a_fresh_folder_has_none(tmp_path):
    assert find_latest(tmp_path / "absent") is None
    assert find_latest(tmp_path) is None
    (tmp_path / "old-iter_0000900").mkdir()
    (tmp_path / "iter_900").mkdir()
    (tmp_path / ".tmp-iter_0000900-0123456789ab").mkdir()
    (tmp_path / TRACKER).write_text("release")  # a converted checkpoint of the MM format
    assert find_latest(tmp_path) is None
    (tmp_path / TRACKER).write_text("900")
    with pytest.raises(CheckpointError) as caught:
        find_latest(tmp_path)
    assert "900" in str(caught.value)


@pytest.mark.parametrize("text", ["", "\x00\x00", "5elease", "1000000", "-1", "1.0"])
def test_an_unusable_tracker_is_reported_and_the_newest_is_used(root, text, caplog):
    (root / TRACKER).write_text(text)
    assert find_latest(root) == root / "iter_0000002"
    assert "names no checkpoint" in caplog.text
    with pytest.raises(CheckpointError) as caught:
        find_latest(root, "strict")
    assert caught.value.id == "CKPT-013"


def test_a_missing_tracker_is_no_problem(root):
    (root / TRACKER).unlink()
    assert find_latest(root, "strict") == root / "iter_0000002"


def test_the_user_may_go_back_by_editing_the_tracker(root, caplog):
    (root / TRACKER).write_text("1\n")
    assert find_latest(root, "strict") == root / "iter_0000001"
    assert "going back" in caplog.text


def test_a_tracker_older_than_an_unannounced_checkpoint_is_a_crash_not_a_choice(root):
    (root / TRACKER).write_text("1")
    (root / "iter_0000002" / ".tracker_done").unlink()
    assert find_latest(root, "strict") == root / "iter_0000002"


def test_going_back_to_a_damaged_one_never_goes_forward(root):
    save(root, 3, pieces_for(3), {})
    (root / TRACKER).write_text("2")
    flip_a_byte(root / "iter_0000002")
    assert find_latest(root, verify="full") == root / "iter_0000001"


def test_a_replaced_folder_counts_only_where_its_own_is_gone(root):
    (root / "iter_0000002").rename(root / ".replaced-iter_0000002-0123456789ab")
    assert_holds(find_latest(root), 2)
    save(root, 2, pieces_for(7), {})
    assert_holds(find_latest(root), 7)
    assert not list(root.glob(".replaced-*"))


def test_reading_a_damaged_manifest_names_the_reason(root):
    (root / "iter_0000002" / SHARD).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_manifest(root / "iter_0000002")
