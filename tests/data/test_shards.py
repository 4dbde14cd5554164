"""Stores of shards: what was written comes back bit for bit, and what is packed again trains alike."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch
from feature_stores import feature, write_store
from shard_stores import KEY, add_prompt, content, nothing, opened, random_shards, write_shards

from mm.data.features import Feature, Origin, feature_name, text_hash, write_feature
from mm.data.loader import feature_batches
from mm.data.sampler import BatchPlan
from mm.data.store.repack import repack
from mm.data.store.shard import SAMPLE
from mm.data.store.writer import ShardWriter
from mm.errors import DataError


@pytest.mark.parametrize("seed", range(8))
def test_random_samples_come_back(seed: int, tmp_path: Path) -> None:
    shards = random_shards(seed)
    samples = [sample for shard in shards for sample in shard]
    write_shards(tmp_path / "s", shards)
    data = opened(tmp_path / "s")
    assert len(data) == len(samples)
    for index, (name, _, item) in enumerate(samples):
        assert item.latents is not None
        found = data[index]
        assert data.name(index) == name and data.latent_shape(index) == tuple(item.latents.shape)
        assert found["sample"] == index and found["latents"].dtype == item.latents.dtype
        assert torch.equal(found["latents"], item.latents) and torch.equal(found["prompt"], item.prompt)
    assert torch.equal(data.empty_prompt(), torch.full((1, 8), 7.0))
    shapes = [tuple(item.latents.shape) for _, _, item in samples if item.latents is not None]
    assert data.shapes() == Counter(shapes) and list(data.shapes()) == list(dict.fromkeys(shapes))
    rows = data.of_draw(0)
    for shape, count in data.buckets().items():
        assert [rows.in_bucket(shape, k) for k in range(count)] == [i for i, s in enumerate(shapes) if s == shape]
        with pytest.raises(IndexError):
            rows.in_bucket(shape, count)


def test_a_caption_is_stored_once_whoever_uses_it(tmp_path: Path) -> None:
    prompt = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    latents = torch.zeros(16, 1, 2, 2)
    shards = [[(f"{shard}-{i}", "one caption", Feature(latents, prompt)) for i in range(10)] for shard in range(3)]
    write_shards(tmp_path / "s", shards)
    bodies = b"".join((tmp_path / "s" / "shards" / f"{n:08d}" / "body.bin").read_bytes() for n in range(3))
    assert bodies.count(prompt.numpy().tobytes()) == 1
    data = opened(tmp_path / "s")
    assert all(torch.equal(data[index]["prompt"], prompt) for index in range(30))


def test_identity_tells_the_samples_and_not_the_place(tmp_path: Path) -> None:
    shards = random_shards(3)
    write_shards(tmp_path / "a", shards)
    write_shards(tmp_path / "b", shards)
    assert opened(tmp_path / "a").identity() == opened(tmp_path / "b").identity()
    number = next(n for n, shard in enumerate(shards) if len(shard) > 1)
    shards[number].reverse()
    write_shards(tmp_path / "c", shards)
    assert opened(tmp_path / "c").identity() != opened(tmp_path / "a").identity()


def test_of_two_that_finish_one_shard_the_first_stays(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, KEY) as first, ShardWriter(tmp_path, 0, KEY) as second:
        for writer in (first, second):
            add_prompt(writer, "", torch.zeros(1, 8))
        first.commit()
        before = content(tmp_path)
        second.commit()
    assert {name: value for name, value in content(tmp_path).items() if ".tmp" not in name} == {
        name: value for name, value in before.items() if ".tmp" not in name
    }
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["00000000"]


def test_records_are_of_a_fixed_width() -> None:
    """Another width, or another order of bytes, is another version of the format."""
    assert SAMPLE.itemsize == 8 + 8 + 16 + 16 + 4 + 4 + 16 + 8 + 4
    assert all(SAMPLE[name].base.str[0] in "<|" for name in SAMPLE.names or ())


def test_a_repacked_store_trains_alike(tmp_path: Path) -> None:
    old = write_store(tmp_path / "old", 23)
    told: list[tuple[int, int]] = []
    size = (old / "features" / "empty_prompt.safetensors").stat().st_size
    manifest = repack(old, tmp_path / "new", 20 * size, lambda *args: told.append(args))
    assert manifest.samples == 23 and manifest.shards == len(told) > 2 and told[-1] == (23, 23)
    before, after = opened(old), opened(tmp_path / "new")
    assert [after.name(i) for i in range(23)] == [before.name(i) for i in range(23)]
    batches = [
        feature_batches(data, BatchPlan(4, 2, 1, 2), text_len=512, seed=5, caption_dropout=0.3, with_noise=True)
        for data in (before, after)
    ]
    for _ in range(20):
        one, other = (next(found) for found in batches)
        assert one["sample"] == other["sample"] and one["draw"] == other["draw"]
        assert all(torch.equal(one[name], other[name]) for name in ("latents", "text", "noise"))


def test_a_repacking_that_was_killed_goes_on(tmp_path: Path) -> None:
    old = write_store(tmp_path / "old", 9)
    repack(old, tmp_path / "once", 30000, nothing)

    class KilledError(Exception):
        pass

    def kill(done: int, _: int) -> None:
        if done >= 4:
            raise KilledError

    with pytest.raises(KilledError):
        repack(old, tmp_path / "new", 30000, kill)
    assert not (tmp_path / "new" / "manifest.json").exists()
    left = tmp_path / "new" / "shards" / ".tmp-00000001-x"
    left.mkdir()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "new" / "shards").glob("0*")}
    repack(old, tmp_path / "new", 30000, nothing)
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert content(tmp_path / "new") == content(tmp_path / "once") and not left.exists()
    with pytest.raises(DataError, match="DATA-068"):
        repack(old, tmp_path / "new", 30000, nothing)
    (tmp_path / "new" / "manifest.json").unlink()
    with pytest.raises(DataError, match="DATA-068"):
        repack(old, tmp_path / "new", 60000, nothing)


def test_repacking_stops_at_a_damaged_file(tmp_path: Path) -> None:
    old = write_store(tmp_path / "old", 3)
    damaged = sorted((old / "features").glob("[0-9]*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-4])
    with pytest.raises(DataError, match=rf"DATA-011: {damaged}"):
        repack(old, tmp_path / "new", 1, nothing)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_embeddings_of_one_caption_that_differ_are_all_kept(tmp_path: Path) -> None:
    """All samples have one caption, and two embeddings of it."""
    old = write_store(tmp_path / "old", 12)
    for number in range(12):
        item, name = feature(number), f"videos/{number}.mp4"
        item = dataclasses.replace(item, prompt=torch.full((3 + number % 2, 8), float(number % 2)))
        write_feature(old / "features" / feature_name(name), item, Origin(name, KEY, text_hash("x"), "v"), 512)
    for name, size in (("one", 10**9), ("many", 1)):
        manifest = repack(old, tmp_path / name, size, nothing)
        data, bodies = opened(tmp_path / name), (tmp_path / name / "shards").glob("*/body.bin")
        assert all(torch.equal(data[i]["prompt"], opened(old)[i]["prompt"]) for i in range(12))
        assert b"".join(body.read_bytes() for body in bodies).count(b'"prompt_mask"') == 3, "with the empty one"
        assert manifest.shards == {"one": 1, "many": 12}[name]
