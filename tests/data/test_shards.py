"""Stores of shards: what was written comes back bit for bit, and whatever is wrong with one is told in one line."""

import dataclasses
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_feature_store import MODEL, RECIPE, feature, feature_set, write_store

from mm.config.bad_samples import parse_on_bad_sample
from mm.data.dataset import FeatureDataset, open_features
from mm.data.features import Feature, Origin, feature_name, text_hash, write_feature
from mm.data.listing import FeatureRow
from mm.data.loader import feature_batches
from mm.data.recipe import save_recipe
from mm.data.sampler import BatchPlan
from mm.data.store.catalog import finish_store
from mm.data.store.repack import repack
from mm.data.store.shard import SAMPLE
from mm.data.store.table import open_table, write_table
from mm.data.store.writer import ShardWriter, prompt_blob, prompt_key
from mm.errors import DataError

SHAPES = ((16, 3, 8, 8), (16, 1, 8, 8), (16, 2, 4, 8))
KEY = RECIPE.key


def row(sample: str, caption: str, item: Feature) -> FeatureRow:
    assert item.latents is not None
    shape = tuple(item.latents.shape)
    return FeatureRow(
        sample=sample, file="features/x.safetensors", path=sample, cap=caption, start_frame_idx=item.start_frame,
        sample_num_frames=9, sample_size="9x64x64", latent_shape=shape, text_tokens=len(item.prompt), video="v",
    )  # fmt: skip


def add_prompt(writer: ShardWriter, caption: str, prompt: torch.Tensor) -> None:
    writer.add_prompt(prompt_key(caption), prompt_blob(caption, prompt, 512, KEY), len(prompt))


def write_shards(store: Path, shards: list[list[tuple[str, str, Feature]]], empty: bool = True) -> None:
    """A store of the given samples (id, caption, feature); a caption goes to the first shard that has it."""
    store.mkdir()
    save_recipe(store, RECIPE)
    owners: dict[str, int] = {}
    for number, samples in enumerate(shards):
        with ShardWriter(store, number, KEY) as writer:
            if empty and number == 0:
                owners[""] = 0
                add_prompt(writer, "", torch.full((1, 8), 7.0))
            for sample, caption, item in samples:
                if owners.setdefault(caption, number) == number:
                    add_prompt(writer, caption, item.prompt)
                origin = Origin(sample, KEY, text_hash(caption), "v")
                writer.add(row(sample, caption, item), item, origin, (owners[caption], prompt_key(caption)))
            writer.commit()
    finish_store(store, len(shards), KEY)


def random_shards(seed: int) -> list[list[tuple[str, str, Feature]]]:
    """Shards of random lengths, one of them perhaps empty, of random names, captions, shapes and kinds of numbers."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = {caption: torch.randn(draw.randint(1, 9), 8, generator=numbers) for caption in ("a", "é ∀", "c" * 300)}
    prompts[""] = torch.full((1, 8), 7.0)
    shards = []
    for number in range(draw.randint(1, 5)):
        samples = []
        for index in range(draw.randint(0, 12)):
            name = f"{''.join(draw.choices('ab/ é日', k=draw.randint(1, 40)))}{number}-{index}"
            caption, dtype = draw.choice(list(prompts)), draw.choice((torch.float32, torch.bfloat16, torch.float16))
            latents = torch.randn(draw.choice(SHAPES), generator=numbers).to(dtype)
            samples.append((name, caption, Feature(latents, prompts[caption], draw.randint(0, 99))))
        shards.append(samples)
    return shards


def opened(store: Path) -> FeatureDataset:
    return open_features(feature_set(store), MODEL)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def read_all(store: Path) -> None:
    data = opened(store)
    data.empty_prompt()
    for index in range(len(data)):
        data[index]


def flip(path: Path, place: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 0x10
    path.write_bytes(damaged)


def lie(store: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], number: int = 1) -> None:
    """An index of a writer that errs: its checksum and the manifest are as they should be for it."""
    path = store / "shards" / f"{number:08d}" / "index.bin"
    table = open_table(path, "shard index", "")
    about, columns = json.loads(json.dumps(table.header.about)), {k: v.copy() for k, v in table.columns.items()}
    change(about, columns)
    write_table(path, "shard index", about, columns)
    finish_store(store, 3, KEY)


def set_field(name: str, row_number: int, value: int, column: str = "samples") -> Callable[[Any, Any], None]:
    def change(_: dict[str, Any], columns: dict[str, Any]) -> None:
        columns[column][name][row_number] = value

    return change


def body(store: Path, number: int = 1) -> Path:
    return store / "shards" / f"{number:08d}" / "body.bin"


def index(store: Path, number: int = 1) -> Path:
    return store / "shards" / f"{number:08d}" / "index.bin"


def of_another_recipe(store: Path) -> None:
    save_recipe(store, RECIPE.model_copy(update={"seed": 2}))


def shard_of_another_recipe(store: Path) -> None:
    lie(store, lambda about, _: None)
    shutil.rmtree(store / "shards" / "00000001")
    with ShardWriter(store, 1, "another") as writer:
        writer.commit()
    manifest = json.loads((store / "manifest.json").read_text())
    header = open_table(index(store), "shard index", "").header
    catalog = open_table(store / manifest["catalog"], "store catalog", "")
    columns = {name: column.copy() for name, column in catalog.columns.items()}
    columns["digests"][1] = np.frombuffer(header.checksum.value, np.uint8)
    digest = write_table(store / "new", "store catalog", {}, columns)
    os.rename(store / "new", store / f"catalog-{digest.hex()}.bin")
    manifest["catalog"] = f"catalog-{digest.hex()}.bin"
    (store / "manifest.json").write_text(json.dumps(manifest))


def manifest(store: Path, **values: Any) -> None:
    path = store / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def other_shapes(store: Path) -> list[list[int]]:
    """Shapes of as many samples, one of which is half as high."""
    shapes: list[list[int]] = json.loads((store / "manifest.json").read_text())["shapes"]
    return [[c, f, h // 2 if number == 0 else h, w, n] for number, (c, f, h, w, n) in enumerate(shapes)]


def dtype_of_index(store: Path) -> None:
    """One flipped bit, of which numpy raises a SyntaxError."""
    content = index(store).read_bytes()
    assert b'"<u8"' in content
    index(store).write_bytes(content.replace(b'"<u8"', b'",u8"', 1))


def fewer(about: dict[str, Any], _: dict[str, Any]) -> None:
    about["samples"] -= 1
    about["shapes"][0][4] -= 1


def shorter_order(_: dict[str, Any], columns: dict[str, Any]) -> None:
    columns["order"] = columns["order"][:-1]


def same_place(_: dict[str, Any], columns: dict[str, Any]) -> None:
    columns["samples"]["offset"][1] = columns["samples"]["offset"][0]


def other_order(_: dict[str, Any], columns: dict[str, Any]) -> None:
    columns["order"] = columns["order"][::-1].copy()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte of a sample": (lambda s: flip(body(s), 700), "DATA-153"),
    "flipped byte of a caption": (lambda s: flip(body(s, 0), 300), "DATA-153"),
    "flipped byte of an index": (lambda s: flip(index(s), -5), "DATA-150"),
    "flipped byte of an index's header": (lambda s: flip(index(s), 60), "DATA-150"),
    "flipped byte of an index's checksum": (lambda s: flip(index(s), 10), "DATA-150"),
    "flipped byte of the catalog": (lambda s: flip(next(s.glob("catalog-*")), -70), "DATA-150"),
    "truncated index": (lambda s: os.truncate(index(s), 400), "DATA-150"),
    "empty index": (lambda s: os.truncate(index(s), 0), "DATA-150"),
    "missing index": (lambda s: index(s).unlink(), "DATA-150"),
    "index of another shard": (lambda s: shutil.copy(index(s, 2), index(s)), "DATA-150"),
    "truncated body": (lambda s: os.truncate(body(s), body(s).stat().st_size - 64), "DATA-152"),
    "longer body": (lambda s: os.truncate(body(s), body(s).stat().st_size + 64), "DATA-152"),
    "missing body": (lambda s: body(s).unlink(), "DATA-152"),
    "missing shard": (lambda s: shutil.rmtree(s / "shards" / "00000001"), "DATA-154"),
    "no shards": (lambda s: shutil.rmtree(s / "shards"), "DATA-154"),
    "store of another recipe": (of_another_recipe, "DATA-155"),
    "shard of another recipe": (shard_of_another_recipe, "DATA-155"),
    "manifest that is no JSON": (lambda s: (s / "manifest.json").write_text("{"), "DATA-156"),
    "manifest of a later version": (lambda s: manifest(s, version=2), "DATA-156"),
    "manifest that counts otherwise": (lambda s: manifest(s, samples=9), "DATA-156"),
    "manifest with fewer shards": (lambda s: manifest(s, shards=2), "DATA-156"),
    "manifest with other shapes": (lambda s: manifest(s, shapes=[[16, 3, 8, 8, 7]]), "DATA-156"),
    "manifest with shapes of as many": (lambda s: manifest(s, shapes=other_shapes(s)), "DATA-156"),
    "manifest with another identity": (lambda s: manifest(s, identity="0" * 32), "DATA-156"),
    "index with another dtype": (lambda s: dtype_of_index(s), "DATA-150"),
    "catalog that is missing": (lambda s: next(s.glob("catalog-*")).unlink(), "DATA-150"),
    "offset past the end": (lambda s: lie(s, set_field("offset", 0, 2**40)), "DATA-151"),
    "offset whose end overflows": (lambda s: lie(s, set_field("offset", 0, 2**64 - 64)), "DATA-151"),
    "length past the end": (lambda s: lie(s, set_field("length", 3, 10**6)), "DATA-151"),
    "offset that is not aligned": (lambda s: lie(s, set_field("offset", 0, 1)), "DATA-151"),
    "overlapping samples": (lambda s: lie(s, same_place), "DATA-151"),
    "name past the end": (lambda s: lie(s, set_field("name_length", 0, 10**6)), "DATA-151"),
    "caption in no shard": (lambda s: lie(s, set_field("prompt_shard", 0, 3)), "DATA-151"),
    "caption that the shard lacks": (lambda s: lie(s, set_field("prompt_shard", 0, 2)), "DATA-151"),
    "wrong count": (lambda s: lie(s, fewer), "DATA-151"),
    "wrong size of the body": (lambda s: lie(s, lambda about, _: about.update(body_bytes=64)), "DATA-151"),
    "order too short": (lambda s: lie(s, shorter_order), "DATA-151"),
    "order of other samples": (lambda s: lie(s, other_order), "DATA-151"),
    "no order": (lambda s: lie(s, lambda _, columns: columns.pop("order")), "DATA-151"),
    "shape that the order has not": (lambda s: lie(s, set_field("shape", 0, 5)), "DATA-151"),
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three shards of four samples, of two shapes and three captions."""
    numbers = torch.Generator().manual_seed(0)
    prompts = [torch.randn(3, 8, generator=numbers) for _ in range(3)]
    shards = [
        [
            (f"{s}-{i}", "abc"[i % 3], Feature(torch.randn(SHAPES[i % 2], generator=numbers), prompts[i % 3]))
            for i in range(4)
        ]
        for s in range(3)
    ]
    write_shards(tmp_path / "s", shards)
    read_all(tmp_path / "s")
    return tmp_path / "s"


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_wrong_is_told_in_one_line(name: str, store: Path) -> None:
    damage, id = DAMAGES[name]
    damage(store)
    with pytest.raises(DataError) as caught:
        read_all(store)
    assert [problem.id for problem in caught.value.problems] == [id]
    message = str(caught.value)
    assert str(store) in message and "Fix: " in message and "\n" not in message
    assert not [word for word in ("Traceback", "numpy", "Error(") if word in message]


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_of_a_shard_goes_unnoticed(seed: int, store: Path) -> None:
    """Any bit that is not padding between blobs."""
    draw, whole = random.Random(seed), content(store)
    good = [opened(store)[index]["latents"] for index in range(12)]
    for _ in range(25):
        name = draw.choice([name for name in whole if name.endswith(".bin")])
        damaged, place = bytearray(whole[name]), draw.randrange(len(whole[name]))
        damaged[place] ^= 1 << draw.randrange(8)
        (store / name).write_bytes(damaged)
        try:
            data = opened(store)
            data.empty_prompt()
            found = [data[index]["latents"] for index in range(12)]
            assert all(map(torch.equal, found, good)) and name.endswith("body.bin") and whole[name][place] == 0
        except DataError:
            pass
        (store / name).write_bytes(whole[name])


def test_a_damaged_sample_is_replaced_where_that_is_allowed(store: Path) -> None:
    flip(body(store), 700)
    batches = feature_batches(
        opened(store), BatchPlan(1, 1), text_len=512, seed=0, on_bad_sample=parse_on_bad_sample("skip:max=10%")
    )
    seen = [next(batches) for _ in range(12)]
    assert [batch["replaced"] for batch in seen if "replaced" in batch] == [["1-0"]]


def test_a_shard_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, 0, KEY) as writer:
        add_prompt(writer, "", torch.zeros(1, 8))
        assert [path.name[:5] for path in (tmp_path / "shards").iterdir()] == [".tmp-"]
    assert not list((tmp_path / "shards").iterdir())
    with pytest.raises(DataError, match="DATA-013"), ShardWriter(tmp_path, 0, KEY) as writer:
        add_prompt(writer, "x", torch.full((1, 8), float("nan")))


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


def test_a_shard_that_contradicts_itself_finishes_no_store(store: Path) -> None:
    before = content(store)
    with pytest.raises(DataError, match=r"DATA-151.*shards/00000001"):
        lie(store, lambda about, _: about.update(samples=3))
    assert (store / "manifest.json").read_bytes() == before["manifest.json"]


def nothing(_: int, __: int) -> None:
    pass


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
