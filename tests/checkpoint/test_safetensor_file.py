"""The streaming writer against the safetensors library's own reader and writer."""

import errno
import hashlib
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mm.checkpoint import safetensor_file
from mm.checkpoint.safetensor_file import DTYPE_NAMES, Entry, entry_of, write_safetensors
from mm.errors import CheckpointError


def some_tensors():
    torch.manual_seed(0)
    return {
        **{str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPE_NAMES},
        "odd bytes": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).t(),
        "strided": torch.randn(10)[::2],
        "名": torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny, -0.0]),
    }


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_the_library_reads_every_dtype_and_layout_bit_by_bit(tmp_path):
    tensors = some_tensors()
    path = tmp_path / "a.safetensors"
    written = write_safetensors(path, [entry_of(n, t) for n, t in tensors.items()], {"format": "pt"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert written.num_bytes == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_data_is_laid_out_as_the_library_does_it(tmp_path):
    tensors = {n: t.contiguous() for n, t in some_tensors().items()}
    write_safetensors(tmp_path / "ours", [entry_of(n, t) for n, t in tensors.items()])
    save_file(tensors, tmp_path / "theirs")
    ours, theirs = (tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes()
    data_of = lambda raw: raw[8 + int.from_bytes(raw[:8], "little") :]  # noqa: E731
    assert len(data_of(ours)) == len(data_of(theirs))
    assert int.from_bytes(ours[:8], "little") % 8 == 0


def test_one_tensor_at_a_time_is_read(tmp_path):
    alive = []

    def read():
        alive.append(1)
        return torch.zeros(2)

    entries = [Entry(str(i), torch.float32, (2,), read) for i in range(3)]
    assert not alive
    write_safetensors(tmp_path / "a", entries)
    assert len(alive) == 3


def test_existing_files_are_not_touched(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "a", [entry_of("x", torch.ones(2))])
    assert (tmp_path / "a").read_text() == "mine"


def test_unstorable_dtypes_and_wrong_announcements_leave_no_file(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        write_safetensors(tmp_path / "a", [entry_of("z", torch.zeros(2, dtype=torch.complex64))])
    assert caught.value.id == "CKPT-017"
    assert "z" in str(caught.value)
    with pytest.raises(ValueError, match="two tensors"):
        write_safetensors(tmp_path / "a", [entry_of("x", torch.ones(1)), entry_of("x", torch.ones(1))])
    with pytest.raises(ValueError, match="not torch"):
        write_safetensors(tmp_path / "a", [Entry("x", torch.float32, (3,), lambda: torch.ones(2))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "attempts"), [(errno.EIO, 3), (errno.ESTALE, 3), (errno.ENOSPC, 1)])
def test_only_a_stumbling_file_system_is_tried_again(tmp_path, monkeypatch, code, attempts):
    calls = []

    def failing_fsync(descriptor):
        calls.append(descriptor)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(safetensor_file.time, "sleep", lambda seconds: None)
    with monkeypatch.context() as patch:
        patch.setattr(safetensor_file.os, "fsync", failing_fsync)
        with pytest.raises(OSError, match=os.strerror(code)):
            write_safetensors(tmp_path / "a", [entry_of("x", torch.ones(2))])
    assert len(calls) == attempts
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_recovers_gives_a_whole_file(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "stumble")
        real(descriptor)

    monkeypatch.setattr(safetensor_file.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(safetensor_file.os, "fsync", fsync)
    write_safetensors(tmp_path / "a", [entry_of("x", torch.arange(5))])
    assert load_file(tmp_path / "a")["x"].tolist() == [0, 1, 2, 3, 4]
