"""Versions of the shards' format: stores of the first are read and go on, those of a later one are left alone."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from feature_stores import MODEL, feature_set
from shard_stores import body, content, flip, index, lie, nothing, read_all, row, write_shards

from mm.data.dataset import open_features
from mm.data.features import Feature, Origin, text_hash
from mm.data.recipe import load_recipe
from mm.data.store import table
from mm.data.store.catalog import finish_store
from mm.data.store.checksum import Checksum, checksum_of
from mm.data.store.copying import copy_store
from mm.data.store.repair import damaged_shards
from mm.data.store.shard import KIND
from mm.data.store.table import open_table
from mm.data.store.writer import ShardWriter, prompt_key
from mm.errors import DataError


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of two shards of two samples, as it was written before version 2."""
    with zipfile.ZipFile(Path(__file__).with_name("store_of_version_1.zip")) as archive:
        archive.extractall(tmp_path / "old")
    return tmp_path / "old"


def latents(number: int) -> torch.Tensor:
    return (torch.arange(64).reshape(16, 1, 2, 2) + 100 * number).bfloat16()


def check_samples(store: Path) -> None:
    data = open_features(feature_set(store), MODEL)
    assert [data.name(i) for i in range(4)] == [f"videos/{s}-{i}.mp4" for s in range(2) for i in range(2)]
    for number in range(4):
        caption = "a" if number % 2 else "bcd"
        assert torch.equal(data[number]["latents"], latents(number))
        assert torch.equal(data[number]["prompt"], torch.full((len(caption) + 1, 8), float(len(caption))))
    assert torch.equal(data.empty_prompt(), torch.full((1, 8), 7.0))


def checksums(store: Path) -> list[str]:
    return [open_table(index(store, number), KIND, "").header.checksum.kind for number in range(2)]


def test_hashes_are_the_published_ones() -> None:
    """xxHash's own test vector of nothing with seed 0; the size of what blake2b gives is in its parameters."""
    assert checksum_of([]).value.hex() == checksum_of([b""]).value.hex() == "99aa06d3014798d86001c324468d497f"
    assert checksum_of([b"ab", b"c"]) == checksum_of([b"abc"])
    assert Checksum("blake2b", bytes.fromhex("cf4ab791c62b8d2b2109c90275287816")).fits(b"abc")


def test_a_store_of_the_first_version_is_read(old: Path, tmp_path: Path) -> None:
    before = content(old)
    check_samples(old)
    assert checksums(old) == ["blake2b", "blake2b"] and damaged_shards(old, nothing) == []
    copy_store(old, tmp_path / "copy", nothing)
    assert content(tmp_path / "copy") == before == content(old)


@pytest.mark.parametrize(("damage", "id"), [((body, 700), "DATA-153"), ((index, -5), "DATA-150")])
def test_damage_of_a_store_of_the_first_version_is_found(damage: tuple, id: str, old: Path) -> None:
    of, place = damage
    flip(of(old), place)
    with pytest.raises(DataError, match=id):
        read_all(old)
    assert [(shard.number, shard.problems[0].id) for shard in damaged_shards(old, nothing)] == [(1, id)]


def test_shards_of_both_versions_are_one_store(old: Path, tmp_path: Path) -> None:
    """The second shard is made again, as after repair."""
    shutil.rmtree(old / "shards" / "00000001")
    key = load_recipe(old).key
    with ShardWriter(old, 1, key) as writer:
        for number, caption in ((2, "bcd"), (3, "a")):
            name = f"videos/1-{number - 2}.mp4"
            item = Feature(latents(number), torch.full((len(caption) + 1, 8), float(len(caption))), 3)
            writer.add(
                row(name, caption, item), item, Origin(name, key, text_hash(caption), "v"), (0, prompt_key(caption))
            )
        writer.commit()
    finish_store(old, 2, key)
    assert checksums(old) == ["blake2b", "xxh3_128"] and damaged_shards(old, nothing) == []
    check_samples(old)
    copy_store(old, tmp_path / "copy", nothing)
    check_samples(tmp_path / "copy")
    flip(body(old), 200)
    with pytest.raises(DataError, match=r"DATA-153.*xxh3_128"):
        read_all(old)


def test_a_store_of_a_later_version_is_told_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair must not take what it cannot read for damaged."""
    store = tmp_path / "s"
    prompt = torch.zeros(1, 8)
    write_shards(store, [[(f"{s}", "x", Feature(latents(s), prompt))] for s in range(3)])
    with monkeypatch.context() as patch:
        patch.setattr(table, "VERSION", 3)
        lie(store, lambda *_: None)  # writes the shard's index and the catalog again
    before = content(store)
    for act in (read_all, lambda path: damaged_shards(path, nothing)):
        with pytest.raises(DataError, match=r"DATA-158.*version 3.*reads versions 1 to 2"):
            act(store)
    (store / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"DATA-158.*index\.bin"):
        damaged_shards(store, nothing)
    assert content(store) == {name: value for name, value in before.items() if name != "manifest.json"}
    damaged = index(store).read_bytes().replace(b'"version": 3', b'"version": 7', 1)
    index(store).write_bytes(damaged)
    assert [shard.problems[0].id for shard in damaged_shards(store, nothing)] == ["DATA-150"], "and no later version"
