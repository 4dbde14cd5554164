"""What conversions refuse or fail at, and that nothing half-written is left then."""

import json
import os
from collections import Counter

import pytest
from conversions import ACTIONS, WRONG, assert_same_bits, copy_of, edited, names, tensors_of, training_run

from mm.checkpoint import convert, fault
from mm.errors import CheckpointError


def test_without_a_configuration_the_original_is_asked_for(original, tmp_path):
    training_run(original, tmp_path / "run", scalars={})
    for action in (convert.convert_to_hf, convert.convert_to_native, convert.convert_to_mm):
        with pytest.raises(CheckpointError) as caught:
            action(tmp_path / "run", tmp_path / "out")
        assert caught.value.id == "CKPT-023"
    convert.convert_to_hf(tmp_path / "run", tmp_path / "out", original)


def test_another_models_original_is_refused(original, tmp_path):
    other = copy_of(original, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config.update(num_attention_heads=4, attention_head_dim=4)  # the same shapes
    (other / "config.json").write_text(json.dumps(config))
    convert.convert_to_mm(original, tmp_path / "mm")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", other)
    assert caught.value.id == "CKPT-024"
    assert f"has num_heads 2, and num_heads in {other} is 4." in str(caught.value)
    convert.convert_to_native(original, tmp_path / "native")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", tmp_path / "native")
    assert caught.value.id == "CKPT-022"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_named(original, tmp_path, wrong):
    edit, text = WRONG[wrong]
    source = edited(original, tmp_path / "source", edit)
    for action in (convert.convert_to_mm, convert.convert_to_native, convert.convert_to_hf):
        with pytest.raises(CheckpointError) as caught:
            action(source, tmp_path / "out")
        assert caught.value.id == "CKPT-011"
        assert text in str(caught.value)
        assert names(tmp_path) == ["source"]


def test_an_original_that_lacks_a_tensor_is_refused(original, tmp_path):
    poorer = edited(original, tmp_path / "poorer", WRONG["missing"][0])
    convert.convert_to_mm(original, tmp_path / "mm")
    with pytest.raises(CheckpointError) as caught:
        convert.convert_to_hf(tmp_path / "mm", tmp_path / "out", poorer)
    assert caught.value.id == "CKPT-011"
    assert "poorer" in str(caught.value)
    assert names(tmp_path) == ["mm", "poorer"]


def test_existing_targets_are_left_alone(original, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for action in (convert.convert_to_hf, convert.convert_to_native):
        for target in ("full", "file", "link"):
            with pytest.raises(CheckpointError) as caught:
                action(original, tmp_path / target)
            assert caught.value.id == "CKPT-020"
    assert names(tmp_path / "full") == ["mine"]
    (tmp_path / "empty").mkdir()
    convert.convert_to_native(original, tmp_path / "empty")
    assert len(names(tmp_path / "empty")) == 2
    for present in ("release", "latest_checkpointed_iteration.txt"):
        target = tmp_path / f"mm with {present}"
        target.mkdir()
        (target / present).write_text("1")
        with pytest.raises(CheckpointError) as caught:
            convert.convert_to_mm(original, target)
        assert caught.value.id == "CKPT-020"
        assert names(target) == [present]


@pytest.mark.parametrize("action", ["raise", "enospc"])
@pytest.mark.parametrize("point", [p for p in fault.CONVERT_POINTS if p != "convert.committed"])
@pytest.mark.parametrize("kind", ACTIONS)
def test_an_error_leaves_nothing(original, tmp_path, monkeypatch, kind, point, action):
    monkeypatch.setenv("MM_FAULT", f"{point}:1:{action}")
    monkeypatch.setattr(fault, "_passed", Counter())
    with pytest.raises((fault.FaultInjected, CheckpointError)):
        ACTIONS[kind](original, tmp_path / "out")
    assert names(tmp_path) == []


@pytest.mark.parametrize("point", fault.CONVERT_POINTS)
def test_a_kill_leaves_nothing_or_everything_at_the_target(original, tmp_path, point):
    pid = os.fork()
    if pid == 0:  # nothing of pytest may run in the child
        try:
            os.environ["MM_FAULT"] = f"{point}:1:kill9"
            convert.convert_to_hf(original, tmp_path / "out", original)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 9
    if point == "convert.committed":
        assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(original))
    else:
        assert not (tmp_path / "out").exists()
        convert.convert_to_hf(original, tmp_path / "out", original)
        assert_same_bits(tensors_of(tmp_path / "out"), tensors_of(original))


def test_too_little_space_is_said_before_writing(original, tmp_path, monkeypatch):
    from test_store import files, namedtuple

    monkeypatch.setattr(files.os, "statvfs", lambda path: namedtuple("disk", "f_bavail f_frsize")(1, 4096))
    for action in ACTIONS.values():
        with pytest.raises(CheckpointError) as caught:
            action(original, tmp_path / "deep" / "out")
        assert caught.value.id == "CKPT-030"
    assert names(tmp_path) == []
