"""Stores of shards of which something is wrong: each is told in one line, and no flipped bit goes unnoticed."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feature_stores import RECIPE
from shard_stores import KEY, SHAPES, add_prompt, body, content, flip, index, lie, opened, read_all, write_shards

from mm.config.bad_samples import parse_on_bad_sample
from mm.data.features import Feature
from mm.data.loader import feature_batches
from mm.data.recipe import save_recipe
from mm.data.sampler import BatchPlan
from mm.data.store.table import open_table, write_table
from mm.data.store.writer import ShardWriter
from mm.errors import DataError


def set_field(name: str, row_number: int, value: int, column: str = "samples") -> Callable[[Any, Any], None]:
    def change(_: dict[str, Any], columns: dict[str, Any]) -> None:
        columns[column][name][row_number] = value

    return change


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


def test_a_shard_that_contradicts_itself_finishes_no_store(store: Path) -> None:
    before = content(store)
    with pytest.raises(DataError, match=r"DATA-151.*shards/00000001"):
        lie(store, lambda about, _: about.update(samples=3))
    assert (store / "manifest.json").read_bytes() == before["manifest.json"]
