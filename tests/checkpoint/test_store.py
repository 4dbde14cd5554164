"""Saving and loading with one process: contents, refusals, overwriting, retention, the folder's rules."""

import json
import os
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mm.checkpoint import files, lock, store
from mm.checkpoint.boxes import Box
from mm.checkpoint.store import (
    Derived,
    Piece,
    find_latest,
    load,
    pieces_of_flat_range,
    read_manifest,
    read_tensor,
    save,
    whole_piece,
    writing,
)
from mm.errors import CheckpointError

REPO = Path(__file__).resolve().parents[2]


def tensors_for(value):
    return {
        "model.w": torch.arange(12.0).reshape(3, 4) + value,
        "model.b": torch.tensor([1.0, -0.0, 3.0], dtype=torch.bfloat16) * value,
        "optimizer.count": torch.tensor(value),
    }


def pieces_for(value):
    return [whole_piece(key, tensor) for key, tensor in tensors_for(value).items()]


def loaded(path):
    tensors = {key: torch.full_like(tensor, 99) for key, tensor in tensors_for(0).items()}
    load(path, [whole_piece(key, tensor) for key, tensor in tensors.items()])
    return tensors


def assert_holds(path, value):
    found = loaded(path)
    for key, tensor in tensors_for(value).items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), key


def names(root):
    return sorted(entry.name for entry in root.iterdir())


def test_a_checkpoint_is_a_folder_that_the_library_reads(tmp_path):
    path = save(tmp_path, 7, pieces_for(5), {"step": 7, "lr": 1e-4, "config": {"a": [1, None]}})
    assert path == tmp_path / "iter_0000007"
    assert_holds(path, 5)
    assert names(tmp_path) == ["iter_0000007", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"
    shard = load_file(path / "shard-00000-of-00001.safetensors")
    assert torch.equal(shard["model.w"], tensors_for(5)["model.w"])
    manifest = read_manifest(path)
    assert manifest.step == 7
    assert manifest.scalars == {"step": 7, "lr": 1e-4, "config": {"a": [1, None]}}
    assert find_latest(tmp_path) == path


def test_pieces_in_any_cut_load_as_any_other(tmp_path):
    whole_tensor = torch.randn(7, 5)
    flat = whole_tensor.reshape(-1)
    cut = [*pieces_of_flat_range("w", (7, 5), 0, flat[:13]), *pieces_of_flat_range("w", (7, 5), 13, flat[13:])]
    path = save(tmp_path, 1, cut, {})
    column = torch.zeros(7, 2)
    load(path, [Piece("w", (7, 5), Box((0, 3), (7, 2)), column)])
    assert torch.equal(column, whole_tensor[:, 3:])
    shard = torch.zeros(9)
    load(path, pieces_of_flat_range("w", (7, 5), 11, shard))
    assert torch.equal(shard, flat[11:20])


def test_loading_writes_into_views_that_are_not_contiguous(tmp_path):
    path = save(tmp_path, 1, [whole_piece("w", torch.arange(6.0).reshape(2, 3))], {})
    buffer = torch.zeros(3, 2)
    load(path, [whole_piece("w", buffer.t())])
    assert buffer.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_only_what_intersects_is_read(tmp_path, monkeypatch):
    path = save(tmp_path, 1, pieces_for(1), {})
    opened = []
    real = store.safe_open

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.inner = self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            opened.append(name)
            return self.inner.get_slice(name)

        def get_tensor(self, name):
            return self.inner.get_tensor(name)

    monkeypatch.setattr(store, "safe_open", Spy)
    load(path, [whole_piece("model.w", torch.zeros(3, 4))], complete=())
    assert opened == ["model.w"]


def test_weights_alone_can_be_loaded(tmp_path):
    path = save(tmp_path, 1, pieces_for(1), {})
    model = {key: tensor for key, tensor in tensors_for(0).items() if key.startswith("model.")}
    load(path, [whole_piece(key, tensor) for key, tensor in model.items()], complete=("model.",))
    assert torch.equal(model["model.w"], tensors_for(1)["model.w"])


def test_mismatches_are_counted_and_named_and_nothing_is_loaded(tmp_path):
    path = save(tmp_path, 1, [whole_piece(f"k{i:02d}", torch.ones(2)) for i in range(30)], {})
    mine = {f"k{i:02d}": torch.zeros(2) for i in range(15)}
    mine |= {"k00": torch.zeros(3), "k01": torch.zeros(2, dtype=torch.bfloat16), "new": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        load(path, [whole_piece(key, tensor) for key, tensor in mine.items()])
    text = str(caught.value)
    assert caught.value.id == "CKPT-011"
    assert caught.value.exit_code == 74
    assert "1 missing, 15 unexpected, 2 different" in text
    assert "k15" in text
    assert "k24" in text
    assert "k25" not in text  # the first ten only
    assert "k00 is F32 [2] there, F32 [3] here" in text
    assert "k01 is F32 [2] there, BF16 [2] here" in text
    assert all(not tensor.any() for tensor in mine.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(tmp_path, value, dtype):
    before = save(tmp_path, 1, pieces_for(1), {})
    bad = torch.zeros(4, 4, dtype=dtype)
    bad[2, 3] = value
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, [*pieces_for(2), whole_piece("model.bad", bad)], {})
    assert caught.value.id == "CKPT-016"
    assert "model.bad" in str(caught.value)
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert find_latest(tmp_path) == before


def test_pieces_that_do_not_add_up_are_refused(tmp_path):
    half = [Piece("w", (4, 2), Box((0, 0), (2, 2)), torch.ones(2, 2))]
    for wrong in (half, half * 2, [*half, Piece("w", (5, 2), Box((2, 0), (2, 2)), torch.ones(2, 2))]):
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 1, wrong, {})
        assert caught.value.id == "CKPT-014"
        assert "w" in str(caught.value)
        assert names(tmp_path) == []
    with pytest.raises(ValueError, match="for the box"):
        Piece("w", (4, 2), Box((0, 0), (2, 2)), torch.ones(2, 3))


def test_scalars_that_are_no_json_are_refused(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 1, pieces_for(1), {"loss": float("nan")})
    assert caught.value.id == "CKPT-016"
    with pytest.raises(TypeError):
        save(tmp_path, 1, pieces_for(1), {"path": tmp_path})
    with pytest.raises(ValueError, match="seven digits"):
        save(tmp_path, 10**7, pieces_for(1), {})
    assert names(tmp_path) == []


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1, pieces_for(1), {})
    before = names(tmp_path)
    disk = namedtuple("disk", "f_bavail f_frsize")(10, 4096)
    monkeypatch.setattr(files.os, "statvfs", lambda path: disk)
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, pieces_for(2), {})
    assert caught.value.id == "CKPT-030"
    assert names(tmp_path) == before


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """A real refusal by the kernel: the process may not write files larger than 64 KiB."""
    save(tmp_path, 1, pieces_for(1), {})
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from mm.checkpoint.store import save, whole_piece
from mm.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save(Path({str(tmp_path)!r}), 2, [whole_piece("w", torch.ones(1000, 100))], {{}})
except CheckpointError as error:
    print(error); sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 74, done.stderr
    assert "CKPT-031" in done.stdout
    assert "File too large" in done.stdout
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert_holds(find_latest(tmp_path), 1)


def test_a_read_only_folder_is_an_error_before_training(tmp_path):
    root = tmp_path / "file" / "ckpt"
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError) as caught, writing(root):
        pass
    assert caught.value.id == "CKPT-031"
    assert str(root) in str(caught.value)


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 1, pieces_for(1), {})
    save(tmp_path, 1, pieces_for(8), {})
    assert names(tmp_path) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert_holds(find_latest(tmp_path), 8)


def test_a_foreign_folder_in_the_place_is_refused(tmp_path):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "precious").write_text("x")
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 2, pieces_for(2), {})
    assert caught.value.id == "CKPT-020"
    assert (tmp_path / "iter_0000002" / "precious").exists()
    assert len(names(tmp_path)) == 1


def test_retention_keeps_the_newest_complete_ones(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step, pieces_for(step), {}, keep_latest=3)
    for step in range(11, 16):  # five torn saves that look like checkpoints
        (tmp_path / f"iter_{step:07d}").mkdir()
        (tmp_path / f"iter_{step:07d}" / "manifest.json").write_text("{")
    path = save(tmp_path, 20, pieces_for(20), {}, keep_latest=2)
    complete = [
        name for name in names(tmp_path) if name.startswith("iter") and (tmp_path / name / ".tracker_done").exists()
    ]
    assert complete == ["iter_0000003", "iter_0000020"]
    assert find_latest(tmp_path) == path


def test_retention_leaves_newer_ones_after_going_back(tmp_path):
    for step in (1, 2, 9):
        save(tmp_path, step, pieces_for(step), {})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    save(tmp_path, 3, pieces_for(3), {}, keep_latest=1)
    assert [n for n in names(tmp_path) if n.startswith("iter")] == ["iter_0000003", "iter_0000009"]
    assert find_latest(tmp_path) == tmp_path / "iter_0000003"


def test_many_cycles_leave_nothing_behind(tmp_path):
    with writing(tmp_path):
        descriptors = len(os.listdir("/proc/self/fd"))
        for step in range(25):
            save(tmp_path, step, pieces_for(step), {}, keep_latest=2)
        assert len(os.listdir("/proc/self/fd")) == descriptors
    assert names(tmp_path) == ["iter_0000023", "iter_0000024", "latest_checkpointed_iteration.txt"]


def test_saving_needs_no_second_copy_of_the_tensors(tmp_path):
    """In a process of its own, whose peak can be measured: 160 MB of tensors, a few MB more while saving."""
    code = f"""
import resource, torch
from pathlib import Path
from mm.checkpoint.store import save, whole_piece
pieces = [whole_piece(f"w{{i}}", torch.ones(4_000_000)) for i in range(10)]
save(Path({str(tmp_path)!r}), 1, [whole_piece("warm", torch.ones(10))], {{}})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
save(Path({str(tmp_path)!r}), 2, pieces, {{}})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert int(done.stdout) < 20e6


def environment():
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def test_two_jobs_do_not_share_a_folder(tmp_path):
    code = f"""
import sys
from pathlib import Path
from mm.checkpoint.store import writing
with writing(Path({str(tmp_path)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError) as caught, writing(tmp_path):
            pass
        assert caught.value.id == "CKPT-034"
        assert f"process {other.pid}" in str(caught.value)
        assert lock.socket.gethostname() in str(caught.value)
        other.kill()
        deadline = time.monotonic() + 10
        while other.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with writing(tmp_path):  # the holder is dead: taken over
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    finally:
        other.kill()
        other.communicate()
    assert names(tmp_path) == []


def test_a_lock_of_another_host_or_of_a_reused_pid(tmp_path):
    mine = {"host": lock.socket.gethostname(), "pid": os.getpid(), "started": "another boot/1"}
    (tmp_path / ".lock").write_text(json.dumps({**mine, "host": "elsewhere"}))
    with pytest.raises(CheckpointError) as caught, writing(tmp_path):
        pass
    assert "elsewhere" in str(caught.value)
    (tmp_path / ".lock").write_text(json.dumps(mine))  # a process of this number lives, but it is a later one
    with writing(tmp_path):
        pass
    assert names(tmp_path) == []


def test_the_lock_is_released_by_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), writing(tmp_path):
        raise RuntimeError("boom")
    with writing(tmp_path):
        pass


def test_derived_files_are_committed_with_the_checkpoint_or_nothing_is(tmp_path):
    def write(folder, manifest):
        assert not (folder / "manifest.json").exists()  # what is not complete yet is not a checkpoint
        (folder / "derived.bin").write_bytes(read_tensor(folder, manifest, "model.w").numpy().tobytes())

    def fail(folder, manifest):
        write(folder, manifest)
        raise CheckpointError("CKPT-031", "The disk is full.", "Free some space.")

    with writing(tmp_path):
        path = save(tmp_path, 1, pieces_for(1), {}, derived=Derived(write, 48))
        before = names(tmp_path)
        with pytest.raises(CheckpointError, match="CKPT-031"):
            save(tmp_path, 2, pieces_for(2), {}, derived=Derived(fail, 48))
        with pytest.raises(CheckpointError, match="CKPT-030"):
            save(tmp_path, 2, pieces_for(2), {}, derived=Derived(write, 2**60))
        assert names(tmp_path) == before
        assert (path / "derived.bin").read_bytes() == tensors_for(1)["model.w"].numpy().tobytes()
        assert_holds(path, 1)
        save(tmp_path, 3, pieces_for(3), {}, keep_latest=1)
    assert not path.exists()
