"""The file of one feature: what was written comes back, and no wrong, damaged or dangerous file is taken for one."""

import errno
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from feature_stores import MODEL, ORIGIN, feature, metadata, tensors
from safetensors.torch import load_file, save_file

import mm.data.files
from mm.data.features import Feature, read_feature, read_header, write_feature
from mm.data.finite import require_finite
from mm.errors import DataError


def test_a_feature_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = feature(tokens=5)
    write_feature(path, written, ORIGIN, 512)
    assert read_header(path).origin == ORIGIN
    found = read_feature(path, MODEL, (ORIGIN.sample, ORIGIN.recipe))
    assert found.latents is not None and written.latents is not None
    assert torch.equal(found.latents, written.latents) and torch.equal(found.prompt, written.prompt)
    assert found.start_frame == 4
    plain = load_file(path)  # the library's own reader agrees on the format
    assert set(plain) == {"latents", "prompt", "prompt_mask"}
    assert plain["prompt_mask"].dtype == torch.uint8 and plain["prompt_mask"].tolist() == [1] * 5 + [0] * 507
    assert os.listdir(tmp_path) == ["a.safetensors"]


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors().items() if key != name}


@pytest.mark.parametrize(
    ("content", "id"),
    [
        (without("latents"), "DATA-012"),
        (without("prompt"), "DATA-012"),
        (without("prompt_mask"), "DATA-012"),
        (tensors() | {"more": torch.zeros(1)}, "DATA-012"),
        (tensors() | {"latents": torch.full((16, 3, 8, 8), float("nan"))}, "DATA-013"),
        (tensors() | {"prompt": torch.full((3, 8), float("inf"))}, "DATA-013"),
        (tensors() | {"latents": torch.zeros(16, 3, 8, 8, dtype=torch.float64)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(16, 3, 8, 8, dtype=torch.int32)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(4, 3, 8, 8)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(16, 3, 8, 7)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(16, 0, 8, 8)}, "DATA-012"),
        (tensors() | {"latents": torch.zeros(1, 16, 3, 8, 8)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(3, 9)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(0, 8)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(4, 8)}, "DATA-012"),
        (tensors() | {"prompt": torch.zeros(513, 8)}, "DATA-017"),
        (tensors() | {"prompt_mask": torch.zeros(512)}, "DATA-012"),
    ],
)
def test_wrong_tensors(content: dict[str, torch.Tensor], id: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(content, path, metadata())
    with pytest.raises(DataError) as caught:
        read_feature(path, MODEL)
    assert caught.value.id == id and str(path) in str(caught.value)


def good_bytes(tmp_path: Path) -> bytes:
    save_file(tensors(), tmp_path / "good", metadata())
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:4],
        lambda b: b[:200],
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: struct.pack("<Q", 2**40) + b[8:],
        lambda b: struct.pack("<Q", len(b)) + b[8:],
        lambda b: b[:8] + b"!" + b[9:],
        lambda b: b"\x80\x04\x95" + b[3:],
        lambda b: b.replace(b"[16,3,8,8]", b"[16,3,-8,8"),
        lambda b: b.replace(b"recipe", b"recipX"),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(damage(good_bytes(tmp_path)))
    with pytest.raises(DataError, match="DATA-011"):
        read_feature(path, MODEL)


def test_header_that_lies_about_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(good_bytes(tmp_path).replace(b"[16,3,8,8]", b"[16,6,8,8]"))
    with pytest.raises(DataError, match="DATA-011"):
        read_feature(path, MODEL)


def test_pickle_in_place_of_a_feature_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "a.safetensors"
    path.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(DataError, match="DATA-011"):
        read_feature(path, MODEL)
    assert not canary.exists()


def test_features_of_another_sample_under_this_name(tmp_path: Path) -> None:
    write_feature(tmp_path / "a.safetensors", feature(), ORIGIN, 512)
    with pytest.raises(DataError, match="DATA-016"):
        read_feature(tmp_path / "a.safetensors", MODEL, ("videos/b.mp4", ORIGIN.recipe))


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = Feature(torch.full((16, 3, 8, 8), float("nan")), torch.zeros(3, 8))
    with pytest.raises(DataError, match="DATA-013"):
        write_feature(tmp_path / "a.safetensors", bad, ORIGIN, 512)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer is put in at the last moment it can come, when the data are forced to disk."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(mm.data.files.os, "fsync", full)
    with pytest.raises(DataError) as caught:
        write_feature(path, feature(), ORIGIN, 512)
    assert caught.value.id == "DATA-019"
    assert str(path) in str(caught.value) and re.search(r"\d [KMG]iB free", str(caught.value))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.safetensors"]


def test_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA-018"):
        write_feature(tmp_path / "none" / "a.safetensors", feature(), ORIGIN, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    """As by asking each value, at every place of vectors and their remainders, beside each other's signs."""
    for size in (1, 7, 64, 1000):
        good = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        require_finite({"x": good}, "here", "")
        for place in {0, size // 2, size - 1, *range(0, size, 97)}:
            for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
                bad = good.clone()
                bad[place] = value
                assert not torch.isfinite(bad).all()
                with pytest.raises(DataError, match="DATA-013"):
                    require_finite({"x": bad}, "here", "")
    require_finite({"x": torch.full((3,), torch.finfo(dtype).max, dtype=dtype), "y": torch.zeros(0)}, "here", "")
