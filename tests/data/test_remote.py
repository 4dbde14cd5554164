"""Stores in object storage: what is read there is what lies there, whatever goes wrong on the way."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from feature_stores import MODEL, write_store
from object_storage import BUCKET, S3, Fault, Proxy, flipped, reset, slow, status, truncated
from remote_stores import assert_same, from_disk, opened, samples, storage
from shard_stores import SEED, body, content, flip, random_shards, write_shards

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.data import store_sources
from mm.config.run.data import FeatureSet
from mm.config.storage import Remote, Storage, location_of
from mm.data.dataset import open_features
from mm.data.loader import feature_batches
from mm.data.remote.reading import exists, names_in, read_bytes
from mm.data.sampler import BatchPlan
from mm.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("credentials")


def test_samples_are_those_on_disk(s3: S3, store: Path, url: str, tmp_path: Path) -> None:
    assert_same(opened(url, storage(tmp_path, s3.endpoint)), from_disk(store))


def test_lists_name_folders_and_addresses(s3: S3, store: Path, url: str, tmp_path: Path) -> None:
    other = shutil.copytree(store, tmp_path / "other")
    (tmp_path / "list.txt").write_text(f"{store}\n{url}/\nfile://{other}\n")
    how = storage(tmp_path, s3.endpoint)
    data = open_features(FeatureSet(path=str(tmp_path / "list.txt"), storage=how), MODEL)
    assert [str(folder) for folder, *_ in data.parts()] == [str(store), url, str(other)]
    once = len(data) // 3
    assert all(torch.equal(data[i]["latents"], data[once + i]["latents"]) for i in range(once))


SMALL, INDEX, BODY = "GET /stores", "index.bin", "body.bin"
PASSING: dict[str, tuple[Fault, str, int]] = {
    f"{name}, {times} of {matches}": (fault, matches, times)
    for name, fault, places in [
        ("500", status(500, "InternalError"), [(SMALL, 1), (INDEX, 2), (BODY, 2)]),
        ("503", status(503, "SlowDown"), [(SMALL, 2), (BODY, 3)]),
        ("reset in the middle", reset, [(SMALL, 1), (INDEX, 2), (BODY, 2)]),
        ("truncated", truncated, [(INDEX, 1), (BODY, 2)]),
        ("flipped on the way", flipped, [(INDEX, 1), (BODY, 1)]),
        ("slow", slow(1.2), [(SMALL, 1), (BODY, 1)]),
    ]
    for matches, times in places
}
EVERY_DAY = ("500, 1 of GET /stores", "500, 2 of index.bin", "503, 3 of body.bin", "reset in the middle, 2 of body.bin",
             "truncated, 1 of index.bin", "truncated, 2 of body.bin", "flipped on the way, 1 of body.bin",
             "slow, 1 of body.bin")  # fmt: skip
"""Every fault, and a fault at every place."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in EVERY_DAY else [pytest.mark.nightly]) for name in PASSING]
)
def test_faults_that_pass(
    name: str, store: Path, url: str, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault, matches, times = PASSING[name]
    proxy.fail(fault, matches, times)
    assert_same(opened(url, storage(tmp_path, proxy.endpoint, request_timeout=0.8)), from_disk(store))
    assert proxy.failed == times
    is_told = "flipped" not in name and not ("truncated" in name and matches == INDEX)  # else its digest tells
    assert bool(re.search(rf"{re.escape(url)}.*; try 2 follows in", caplog.text)) == is_told


FOR_GOOD: dict[str, tuple[Fault, str]] = {
    "500": (status(500, "InternalError"), "DATA-185"),
    "503": (status(503, "SlowDown"), "DATA-185"),
    "reset in the middle": (reset, "DATA-185"),
    "truncated": (truncated, "DATA-185"),
    "slow": (slow(1.0), "DATA-185"),
    "flipped": (flipped, "DATA-153"),
    "403": (status(403, "AccessDenied"), "DATA-182"),
    "unknown key": (status(403, "InvalidAccessKeyId"), "DATA-182"),
    "no bucket": (status(404, "NoSuchBucket"), "DATA-183"),
    "bucket of no name": (status(400, "InvalidBucketName"), "DATA-184"),
}


@pytest.mark.parametrize("name", FOR_GOOD)
@pytest.mark.nightly
def test_faults_that_do_not_pass(name: str, url: str, proxy: Proxy, tmp_path: Path) -> None:
    """One line that names the object, what was said and how often it was tried; nothing is kept in the cache."""
    fault, id = FOR_GOOD[name]
    how = storage(tmp_path, proxy.endpoint, give_up_after=0.5, request_timeout=0.4 if name == "slow" else 20.0)
    data = opened(url, how)
    place = data.place(0)
    assert place.blobs is not None
    proxy.fail(fault, "body.bin")
    before = content(tmp_path / "cache")
    with pytest.raises(DataError, match=id) as caught:
        data[0]
    message = str(caught.value)
    assert f"{url}/shards/" in message and "body.bin" in message and "\n" not in message
    if id == "DATA-185":
        assert re.search(r"the storage said .+, \d+ times in \d+ s\.", message)
    else:
        assert proxy.failed <= 2  # not tried again and again: once, or twice where the way may be at fault
    assert content(tmp_path / "cache") == before
    policy = parse_on_bad_sample("skip:max=50%")
    batches = feature_batches(data, BatchPlan(1, 1), text_len=512, seed=0, on_bad_sample=policy)
    with pytest.raises(DataError, match=f"{id}|DATA-074" if id == "DATA-153" else id):
        for _ in range(3 * len(data)):  # what is at fault of the storage is no fault of a sample
            next(batches)


def test_no_credentials(url: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=f"DATA-181: {url}/recipe.json: there are no credentials"):
        opened(url, storage(tmp_path, s3.endpoint, request_timeout=19.0))  # another client than those before


def test_public_buckets_need_no_credentials(
    s3: S3, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client.create_bucket(Bucket="public", ACL="public-read")
    url = s3.upload(store, "store", "public")
    for key in (path.relative_to(store) for path in store.rglob("*") if path.is_file()):
        s3.client.put_object_acl(Bucket="public", Key=f"store/{key}", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_same(opened(url, storage(tmp_path, s3.endpoint, anonymous=True)), from_disk(store))


def test_no_bucket_and_no_store(s3: S3, tmp_path: Path) -> None:
    how = storage(tmp_path, s3.endpoint)
    with pytest.raises(DataError, match=r"DATA-183: s3://nowhere/x.*its bucket does not exist"):
        opened("s3://nowhere/x", how)
    with pytest.raises(DataError, match=f"DATA-010: s3://{BUCKET}/nothing is no feature store"):
        opened(f"s3://{BUCKET}/nothing", how)


def test_nobody_listens(s3: S3, tmp_path: Path) -> None:
    how = storage(tmp_path, "http://127.0.0.1:9", give_up_after=2.0)
    with pytest.raises(DataError, match=r"DATA-185: .*Could not connect.*[2-9] times"):
        opened(f"s3://{BUCKET}/x", how)


def test_a_store_of_one_file_a_sample(s3: S3, tmp_path: Path) -> None:
    write_store(tmp_path / "old", 3)
    url = s3.upload(tmp_path / "old", f"{tmp_path.name}/old")
    with pytest.raises(DataError, match=f"DATA-186: {url} is no finished store of shards"):
        opened(url, storage(tmp_path, s3.endpoint))


@pytest.mark.parametrize("address", ["s3://", "s3:///x", "s3://b//x", "s3://b/../x", "s3://b/\x07"])
def test_addresses_that_are_none(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CFG-230"):
        store_sources(address, None, "data.jsonl", Storage())


def test_an_address_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("s3://b/x,data.jsonl\n")
    with pytest.raises(ConfigError, match="CFG-054"):
        store_sources(str(tmp_path / "list.txt"), None, "data.jsonl", Storage())


@pytest.mark.parametrize("missing", ["s3fs", "tenacity"])
def test_without_the_library(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    registry = sys.modules["fsspec.registry"]  # fsspec.registry is a mapping in it
    monkeypatch.delitem(registry._registry, "s3", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r'DATA-180: s3://b/x/recipe.json .*pip install "mm-wan\[s3\]"'):
        opened("s3://b/x", Storage(cache=str(tmp_path)))


def test_a_storage_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-180: foo://b/x/recipe.json: fsspec knows no storage foo://"):
        opened("foo://b/x", Storage(cache=str(tmp_path)))


def test_another_storage_of_fsspec(store: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.put(str(store), "/kept/store", recursive=True)
    assert_same(opened("memory://kept/store", Storage(cache=str(tmp_path / "cache"))), from_disk(store))


def drop(s3: S3, key: str) -> None:
    s3.client.delete_object(Bucket=BUCKET, Key=key)


def test_damage_in_the_bucket(s3: S3, tmp_path: Path) -> None:
    """What is found on disk is found in the bucket, with the same ids."""
    for number, (name, damage, id) in enumerate(
        [
            ("body", lambda store: flip(body(store, 0), 300), "DATA-153"),
            ("short body", lambda store: os.truncate(body(store, 0), 128), "DATA-152"),
            ("no body", lambda store: body(store, 0).unlink(), "DATA-152"),
            ("index", lambda store: flip(store / "shards" / "00000000" / "index.bin", -5), "DATA-150"),
            ("no index", lambda store: (store / "shards" / "00000000" / "index.bin").unlink(), "DATA-150"),
            ("catalog", lambda store: flip(next(store.glob("catalog-*")), -70), "DATA-150"),
            ("manifest", lambda store: (store / "manifest.json").write_text("{"), "DATA-156"),
        ]
    ):
        store = tmp_path / str(number)
        write_shards(store, random_shards(SEED))
        damage(store)
        url = s3.upload(store, f"{tmp_path.name}/{number}")
        with pytest.raises(DataError) as caught:
            data = opened(url, storage(tmp_path, s3.endpoint))
            data.empty_prompt()
            samples(data)
        assert [problem.id for problem in caught.value.problems] == [id], name
        assert url in str(caught.value), name


def test_a_shard_that_is_missing(s3: S3, url: str, tmp_path: Path) -> None:
    for name in ("body.bin", "index.bin", "listing.jsonl"):
        drop(s3, f"{tmp_path.name}/store/shards/00000000/{name}")
    with pytest.raises(DataError, match=r"DATA-154: 1 of .* shards are missing, the first is s3://"):
        opened(url, storage(tmp_path, s3.endpoint))


def test_a_damaged_sample_is_replaced_where_that_is_allowed(s3: S3, tmp_path: Path) -> None:
    shards = random_shards(SEED)
    write_shards(tmp_path / "d", shards)
    place = from_disk(tmp_path / "d").place(0)
    assert place.blobs is not None and isinstance(place.blobs[0].file, Path)
    flip(place.blobs[0].file, place.blobs[0].offset + place.blobs[0].length - 1)
    data = opened(s3.upload(tmp_path / "d", f"{tmp_path.name}/d"), storage(tmp_path, s3.endpoint))
    policy = parse_on_bad_sample("skip:max=20%")
    batches = feature_batches(data, BatchPlan(1, 1), text_len=512, seed=0, on_bad_sample=policy)
    seen = [next(batches) for _ in range(len(data))]
    assert [batch["replaced"] for batch in seen if "replaced" in batch] == [[data.name(0)]]


def test_another_store_in_the_same_place_is_not_the_one_before(s3: S3, url: str, tmp_path: Path) -> None:
    how = storage(tmp_path, s3.endpoint)
    samples(opened(url, how))
    write_shards(tmp_path / "new", random_shards(SEED + 1))
    for key in s3.keys(f"{tmp_path.name}/store/"):
        drop(s3, key)
    s3.upload(tmp_path / "new", f"{tmp_path.name}/store")
    assert_same(opened(url, how), from_disk(tmp_path / "new"))


def test_reads_of_places(s3: S3, url: str, store: Path, tmp_path: Path) -> None:
    remote = location_of(url, storage(tmp_path, s3.endpoint))
    assert isinstance(remote, Remote) and location_of(f"file://{store}", Storage()) == store
    assert sorted(names_in(remote)) == sorted(names_in(store))
    assert names_in(remote / "nothing") == names_in(store / "nothing") == []
    assert exists(remote / "recipe.json") and not exists(remote / "recipe")
    assert read_bytes(remote / "recipe.json") == read_bytes(store / "recipe.json")
    for place in (remote, store):
        with pytest.raises(FileNotFoundError):
            read_bytes(place / "nothing")


def test_half_a_store_is_none(s3: S3, store: Path, tmp_path: Path) -> None:
    """Until its manifest is there: it is put last."""
    (store / "manifest.json").unlink()
    with pytest.raises(DataError, match="DATA-186"):
        opened(s3.upload(store, f"{tmp_path.name}/half"), storage(tmp_path, s3.endpoint))
