"""Copies and exports of stores of shards, read by the programs that they are for."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import webdataset
from feature_stores import RECIPE, write_store
from object_storage import BUCKET, S3, Proxy, status
from shard_stores import SEED, body, content, flip, random_shards, write_shards

from mm.cli import data
from mm.data.features import EMPTY_PROMPT, FEATURES, feature_name
from mm.data.listing import FeatureRow, write_listing
from mm.data.recipe import save_recipe
from mm.data.store.repack import repack
from mm.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("s3_environment")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


def samples() -> list[Any]:
    return [sample for shard in random_shards(SEED) for sample in shard]


def copy(source: object, target: object, *flags: str) -> None:
    data.main(["copy", str(source), str(target), *flags])


def export(source: object, target: object, to: str, *flags: str) -> None:
    data.main(["export", str(source), str(target), "--to", to, *flags])


def test_a_copy_is_the_same_there_and_back(s3: S3, store: Path, tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}/copy"
    copy(store, url)
    there = {key.removeprefix(f"{tmp_path.name}/copy/"): s3.get(key) for key in s3.keys(f"{tmp_path.name}/copy/")}
    assert there == content(store)
    copy(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(store)
    copy(url, f"{url}2")
    assert len(s3.keys(f"{tmp_path.name}/copy2/")) == len(there)
    copy(store, tmp_path / "disk")
    assert content(tmp_path / "disk") == content(store)
    copy(store, url)  # there already: nothing is refused, nothing changes
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_the_manifest_comes_last(store: Path, proxy: Proxy, tmp_path: Path) -> None:
    copy(store, f"s3://{BUCKET}/{tmp_path.name}/copy", "--endpoint-url", proxy.endpoint)
    put = [line.rpartition("/")[2].partition("?")[0] for line in proxy.requests if line.startswith("PUT ")]
    assert put[0] == "recipe.json" and put[-1] == "manifest.json"
    shards = put[1:-2]
    assert shards == ["body.bin", "listing.jsonl", "index.bin"] * (len(shards) // 3)


def test_a_copy_goes_on_where_it_was(s3: S3, store: Path, proxy: Proxy, tmp_path: Path) -> None:
    prefix, through = f"{tmp_path.name}/copy/", ("--endpoint-url", proxy.endpoint)
    url = f"s3://{BUCKET}/{tmp_path.name}/copy"
    proxy.fail(status(403, "AccessDenied"), "PUT /stores/" + prefix + "shards/00000001/body.bin")
    with pytest.raises(DataError, match=r"DATA-182: s3://.*00000001/body\.bin"):
        copy(store, url, *through)
    assert f"{prefix}shards/00000000/index.bin" in s3.keys(prefix) and f"{prefix}manifest.json" not in s3.keys(prefix)
    proxy.fail(status(500, "InternalError"), "body.bin", times=1)
    proxy.requests.clear()
    copy(store, url, *through)
    assert proxy.failed == 1 and not [one for one in proxy.requests if one.startswith("PUT") and "00000000/" in one]
    assert {key.removeprefix(prefix): s3.get(key) for key in s3.keys(prefix)} == content(store)
    copy(url, tmp_path / "back")
    (tmp_path / "back" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "back" / "shards" / "00000001")
    kept = tmp_path / "back" / "shards" / "00000000"
    before = kept.stat().st_ino
    copy(url, tmp_path / "back")
    assert content(tmp_path / "back") == content(store) and kept.stat().st_ino == before


def test_damage_is_not_copied(s3: S3, store: Path, tmp_path: Path) -> None:
    url = s3.upload(store, f"{tmp_path.name}/good")
    flip(body(store, 0), 300)
    with pytest.raises(DataError, match="DATA-153"):
        copy(store, tmp_path / "copy")
    with pytest.raises(DataError, match="DATA-153"):
        copy(s3.upload(store, f"{tmp_path.name}/bad"), tmp_path / "copy")
    assert not list((tmp_path / "copy" / "shards").iterdir()) and not (tmp_path / "copy" / "manifest.json").exists()
    copy(url, tmp_path / "copy")


def test_targets_that_hold_something_else(store: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "other", random_shards(SEED + 1))
    before = content(tmp_path / "other")
    with pytest.raises(DataError, match=r"DATA-068: .* not a part of"):
        copy(store, tmp_path / "other")
    for to in ("webdataset", "parquet", "listing"):
        with pytest.raises(DataError, match=r"DATA-187: .* is not empty"):
            export(store, tmp_path / "other", to)
    assert content(tmp_path / "other") == before
    export(store, tmp_path / "out", "parquet")
    for source, to in ((store, "webdataset"), (tmp_path / "other", "parquet")):
        with pytest.raises(DataError, match=r"DATA-187: .* an export of another store, or in another format"):
            export(source, tmp_path / "out", to)
    with pytest.raises(DataError, match=r"DATA-068: .* holds .*export\.json"):
        copy(store, tmp_path / "out")


def test_sources_that_are_no_finished_shards(store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "old", 3)
    (store / "manifest.json").unlink()
    for source in (tmp_path / "old", store):
        with pytest.raises(DataError, match="DATA-186"):
            copy(source, tmp_path / "new")
        with pytest.raises(DataError, match="DATA-186"):
            export(source, tmp_path / "new", "parquet")
    assert not (tmp_path / "new").exists()


def test_words(store: Path) -> None:
    for words in (["copy", "a"], ["export"], ["copy", "a", "--cache", "b"], ["export", "a", "b", "--to", "zip"]):
        with pytest.raises(ConfigError):
            data.main(words)


def test_webdataset_reads_the_samples(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "webdataset")
    files = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    found = list(webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode())
    assert len(found) == len(samples()) > 3
    for index, (sample, (name, caption, feature)) in enumerate(zip(found, samples(), strict=True)):
        assert sample["__key__"] == f"{index:09d}" and sample["txt"] == caption
        assert (sample["json"]["index"], sample["json"]["sample"], sample["json"]["cap"]) == (index, name, caption)
        tensors = safetensors.torch.load(sample["safetensors"])
        assert torch.equal(tensors["latents"], feature.latents) and torch.equal(tensors["prompt"], feature.prompt)
        assert tensors["latents"].dtype == feature.latents.dtype
    again = content(tmp_path / "out")
    export(store, tmp_path / "again", "webdataset")
    assert content(tmp_path / "again") == again


def test_a_webdataset_is_a_store_of_files_again(store: Path, tmp_path: Path) -> None:
    """Its safetensors are feature files: with their listing they make a store that `mm migrate shards` takes."""
    export(store, tmp_path / "out", "webdataset")
    (tmp_path / "files" / FEATURES).mkdir(parents=True)
    save_recipe(tmp_path / "files", RECIPE)
    rows = []
    for file in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(file) as tar:
            members = {entry.name: tar.extractfile(entry) for entry in tar.getmembers()}
            for key in sorted({name.partition(".")[0] for name in members}):
                said = json.loads(members[f"{key}.json"].read())  # type: ignore[union-attr]
                assert (said.pop("index"), said.pop("draw")) == (int(key), 0)
                name = feature_name(said["sample"])
                said["latent_shape"] = tuple(said["latent_shape"])
                rows.append(FeatureRow(**said, file=f"{FEATURES}/{name}"))
                (tmp_path / "files" / FEATURES / name).write_bytes(members[f"{key}.safetensors"].read())  # type: ignore[union-attr]
    write_listing(tmp_path / "files", rows)
    repack(tmp_path / "files", tmp_path / "shards", 10**9, lambda *_: None)
    assert not (tmp_path / "files" / FEATURES / EMPTY_PROMPT).exists()
    export(tmp_path / "shards", tmp_path / "again", "webdataset")

    def blobs(folder: Path) -> list[bytes]:
        found = []
        for file in sorted(folder.glob("*.tar")):
            with tarfile.open(file) as tar:
                found += [tar.extractfile(e).read() for e in tar.getmembers() if e.name.endswith(".safetensors")]  # type: ignore[union-attr]
        return found

    assert blobs(tmp_path / "again") == blobs(tmp_path / "out")


def tensor_of(row: dict[str, Any], name: str) -> torch.Tensor:
    dtype = DTYPES[row[f"{name}_dtype"]]
    return torch.frombuffer(bytearray(row[name]), dtype=dtype).reshape(row[f"{name}_shape"])


def test_parquet_holds_the_samples(s3: S3, store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "parquet")
    export(s3.upload(store, f"{tmp_path.name}/store"), f"s3://{BUCKET}/{tmp_path.name}/out", "parquet")
    rows: list[dict[str, Any]] = []
    for file in sorted((tmp_path / "out").glob("*.parquet")):
        table = pyarrow.parquet.read_table(file)
        rows += table.to_pylist()
        assert pyarrow.parquet.read_table(io.BytesIO(s3.get(f"{tmp_path.name}/out/{file.name}"))) == table
    assert [row["index"] for row in rows] == list(range(len(samples())))
    for row, (name, caption, feature) in zip(rows, samples(), strict=True):
        assert (row["sample"], row["caption"], row["start_frame"]) == (name, caption, feature.start_frame)
        assert torch.equal(tensor_of(row, "latents"), feature.latents)
        assert torch.equal(tensor_of(row, "prompt"), feature.prompt)
        assert int(tensor_of(row, "prompt_mask").sum()) == len(feature.prompt) == row["text_tokens"]
        assert row["latent_shape"] == list(feature.latents.shape)
    first = rows[0]
    if first["latents_dtype"] == "F32":
        plain = np.frombuffer(first["latents"], "<f4").reshape(first["latents_shape"])
        assert np.array_equal(plain, samples()[0][2].latents.numpy())


def test_a_list_says_where_samples_are(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "listing")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "listing.parquet").to_pylist()
    assert [row["sample"] for row in rows] == [name for name, *_ in samples()]
    for row, (_, _, feature) in zip(rows, samples(), strict=True):
        blob = body(store, row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["length"]]
        assert torch.equal(safetensors.torch.load(blob)["latents"], feature.latents)


@pytest.mark.parametrize("to", ["webdataset", "parquet"])
def test_an_export_goes_on_where_it_was(to: str, store: Path, tmp_path: Path) -> None:
    export(store, tmp_path / "whole", to)
    damaged = max((path for path in store.rglob("body.bin") if path.stat().st_size), key=lambda path: path.parent.name)
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-64] + bytes(range(64)))
    os.truncate(damaged, len(good) - 64)
    with pytest.raises(DataError, match="DATA-152"):
        export(store, tmp_path / "out", to)
    assert not json.loads((tmp_path / "out" / "export.json").read_text())["finished"]
    assert not list((tmp_path / "out").glob(".tmp-*"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != "export.json"}
    damaged.write_bytes(good)
    export(store, tmp_path / "out", to)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_list_of_another_shard(store: Path, tmp_path: Path) -> None:
    rows = [path for path in sorted(store.rglob("listing.jsonl")) if path.stat().st_size]
    rows[0].write_bytes(rows[0].read_bytes().partition(b"\n")[2])
    with pytest.raises(DataError, match="DATA-151"):
        export(store, tmp_path / "out", "listing")


def test_captions_may_hold_anything(tmp_path: Path) -> None:
    """Line ends of other scripts too, which end no line of a list."""
    caption = "one\u2028two\x85three\x0bfour\nfive"
    feature = samples()[0][2]
    write_shards(tmp_path / "s", [[("a b/c.d.mp4", caption, feature), ("x", "y", feature)]])
    export(tmp_path / "s", tmp_path / "list", "listing")
    rows = pyarrow.parquet.read_table(tmp_path / "list" / "listing.parquet").to_pylist()
    assert [row["caption"] for row in rows] == [caption, "y"]
    export(tmp_path / "s", tmp_path / "tars", "webdataset")
    found = webdataset.WebDataset(str(tmp_path / "tars" / "000000.tar"), shardshuffle=False).decode()
    assert [sample["txt"] for sample in found] == [caption, "y"]
