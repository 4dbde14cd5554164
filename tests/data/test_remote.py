"""Stores in object storage: what is read there is what lies there, whatever goes wrong on the way."""

import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from object_storage import (
    BUCKET,
    CREDENTIALS,
    S3,
    Fault,
    Proxy,
    flipped,
    proxy_before,
    reset,
    slow,
    status,
    truncated,
)
from test_feature_store import MODEL, write_store
from test_shards import body, content, flip, random_shards, write_shards

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.data import store_sources
from mm.config.run.data import FeatureSet
from mm.config.storage import Remote, Storage, location_of
from mm.data.dataset import FeatureDataset, open_features
from mm.data.loader import feature_batches
from mm.data.remote.cache import Cache
from mm.data.remote.reading import exists, names_in, read_bytes
from mm.data.sampler import BatchPlan
from mm.errors import ConfigError, DataError

SEED = 2  # of shards with several samples each


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**CREDENTIALS, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    write_shards(tmp_path / "s", random_shards(SEED))
    return tmp_path / "s"


@pytest.fixture
def url(s3: S3, local: Path, tmp_path: Path) -> str:
    """The same store in the bucket."""
    return s3.upload(local, f"{tmp_path.name}/store")


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    with proxy_before(s3) as found:
        yield found


def storage(tmp_path: Path, endpoint: str, **more: Any) -> Storage:
    values = {
        "cache": str(tmp_path / "cache"),
        "endpoint_url": endpoint,
        "give_up_after": 60.0,
        "request_timeout": 20.0,
    }
    return Storage(**{**values, **more})


def opened(url: str, how: Storage) -> FeatureDataset:
    return open_features(FeatureSet(path=url, storage=how), MODEL)


def samples(data: FeatureDataset) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    return [(data.name(i), data[i]["latents"], data[i]["prompt"]) for i in range(len(data))]


def assert_same(found: FeatureDataset, expected: FeatureDataset) -> None:
    assert len(found) == len(expected) > 3 and found.identity() == expected.identity()
    assert torch.equal(found.empty_prompt(), expected.empty_prompt())
    for (name, latents, prompt), (name2, latents2, prompt2) in zip(samples(found), samples(expected), strict=True):
        assert name == name2 and torch.equal(latents, latents2) and torch.equal(prompt, prompt2)


def from_disk(store: Path) -> FeatureDataset:
    return open_features(FeatureSet(path="data.jsonl", folder=str(store)), MODEL)


def test_samples_are_those_on_disk(s3: S3, local: Path, url: str, tmp_path: Path) -> None:
    assert_same(opened(url, storage(tmp_path, s3.endpoint)), from_disk(local))


def test_lists_name_folders_and_addresses(s3: S3, local: Path, url: str, tmp_path: Path) -> None:
    other = shutil.copytree(local, tmp_path / "other")
    (tmp_path / "list.txt").write_text(f"{local}\n{url}/\nfile://{other}\n")
    how = storage(tmp_path, s3.endpoint)
    data = open_features(FeatureSet(path=str(tmp_path / "list.txt"), storage=how), MODEL)
    assert [str(folder) for folder, *_ in data.parts()] == [str(local), url, str(other)]
    once = len(data) // 3
    assert all(torch.equal(data[i]["latents"], data[once + i]["latents"]) for i in range(once))


def test_what_is_read_twice_is_fetched_once(local: Path, url: str, proxy: Proxy, tmp_path: Path) -> None:
    how = storage(tmp_path, proxy.endpoint)
    samples(opened(url, how))
    first = len([line for line in proxy.requests if "body.bin" in line or "index.bin" in line or "catalog" in line])
    assert first > 0
    proxy.requests.clear()
    assert_same(opened(url, how), from_disk(local))
    assert not [line for line in proxy.requests if "body.bin" in line or "index.bin" in line or "catalog" in line]


def test_only_the_bytes_of_a_sample_are_read(s3: S3, url: str, tmp_path: Path) -> None:
    how = storage(tmp_path, s3.endpoint)
    data = opened(url, how)
    place = data.place(0)
    assert place.blobs is not None
    before = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    data[0]
    after = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert after - before <= sum(blob.length for blob in place.blobs) + 32  # and the count of written bytes


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
    name: str, local: Path, url: str, proxy: Proxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault, matches, times = PASSING[name]
    proxy.fail(fault, matches, times)
    assert_same(opened(url, storage(tmp_path, proxy.endpoint, request_timeout=0.8)), from_disk(local))
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
    s3: S3, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client.create_bucket(Bucket="public", ACL="public-read")
    url = s3.upload(local, "store", "public")
    for key in (path.relative_to(local) for path in local.rglob("*") if path.is_file()):
        s3.client.put_object_acl(Bucket="public", Key=f"store/{key}", ACL="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_same(opened(url, storage(tmp_path, s3.endpoint, anonymous=True)), from_disk(local))


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


def test_another_storage_of_fsspec(local: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.put(str(local), "/kept/store", recursive=True)
    assert_same(opened("memory://kept/store", Storage(cache=str(tmp_path / "cache"))), from_disk(local))


def drop(s3: S3, key: str) -> None:
    s3.client.delete_object(Bucket=BUCKET, Key=key)


def test_damage_in_the_bucket(s3: S3, local: Path, tmp_path: Path) -> None:
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


def test_a_damaged_cache_mends_itself(s3: S3, local: Path, url: str, tmp_path: Path) -> None:
    how = storage(tmp_path, s3.endpoint)
    samples(opened(url, how))
    draw = random.Random(0)
    for path in (path for path in (tmp_path / "cache").rglob("*") if path.is_file()):
        damaged = bytearray(path.read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice([0, len(damaged) // 2, len(damaged)])])
    assert_same(opened(url, how), from_disk(local))


def test_another_store_in_the_same_place_is_not_the_one_before(s3: S3, url: str, tmp_path: Path) -> None:
    how = storage(tmp_path, s3.endpoint)
    samples(opened(url, how))
    write_shards(tmp_path / "new", random_shards(SEED + 1))
    for key in s3.keys(f"{tmp_path.name}/store/"):
        drop(s3, key)
    s3.upload(tmp_path / "new", f"{tmp_path.name}/store")
    assert_same(opened(url, how), from_disk(tmp_path / "new"))


def test_two_stores_share_a_cache(s3: S3, local: Path, url: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "new", random_shards(SEED + 1))
    other = s3.upload(tmp_path / "new", f"{tmp_path.name}/new")
    how = storage(tmp_path, s3.endpoint)
    first, second = opened(url, how), opened(other, how)
    for _ in range(2):
        assert_same(first, from_disk(local))
        assert_same(second, from_disk(tmp_path / "new"))


def test_the_cache_is_bounded(s3: S3, local: Path, url: str, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in local.rglob("*.bin"))
    most = whole // 3
    how = storage(tmp_path, s3.endpoint, cache_gigabytes=most / 10**9)
    data = opened(url, how)
    largest = max(sum(blob.length for blob in data.place(i).blobs or ()) for i in range(len(data)))
    for index in range(len(data)):
        assert torch.equal(data[index]["latents"], from_disk(local)[index]["latents"])
        kept = [path.stat().st_size for path in (tmp_path / "cache").glob("*/*")]
        assert sum(kept) <= most * 17 / 16 + largest


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    for number in range(3):
        cache.put(f"{number:040d}", bytes(300)).close()
        os.utime(tmp_path / "00" / f"{number:040d}", (number, number))
    found = cache.get(f"{0:040d}")  # used now
    assert found is not None
    found.close()
    (tmp_path / ".tmp-old").write_bytes(b"x")
    os.utime(tmp_path / ".tmp-old", (1, 1))
    (tmp_path / ".tmp-new").write_bytes(b"x")
    cache.put(f"{3:040d}", bytes(300)).close()
    kept = sorted(path.name.lstrip("0") or "0" for path in tmp_path.glob("00/*"))
    assert kept == ["0", "2", "3"]
    assert not (tmp_path / ".tmp-old").exists() and (tmp_path / ".tmp-new").exists()
    large = cache.put(f"{4:040d}", bytes(2000))  # too large to be kept, and open all the same
    assert len(large.read()) == 2000 and not list(tmp_path.glob("00/*"))
    large.close()


def hammer(folder: Path, seed: int) -> int:
    """Writes and reads a small cache as one of several processes; returns how often something was found."""
    cache, draw, found = Cache(folder, 20_000), random.Random(seed), 0
    for _ in range(400):
        number = draw.randrange(50)
        stream = cache.get(f"{number:040d}")
        if stream is None:
            stream = cache.put(f"{number:040d}", bytes([number]) * (number * 40))
        else:
            found += 1
        with stream:
            assert stream.read() == bytes([number]) * (number * 40)
    return found


def test_many_processes_share_a_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("forkserver").Pool(4) as pool:
        assert min(pool.starmap(hammer, [(tmp_path, seed) for seed in range(4)])) > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 20_000 * 17 / 16
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_cache_that_cannot_be_written(s3: S3, url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"DATA-018: .*Fix: Correct storage.cache"):
        opened(url, storage(tmp_path, s3.endpoint, cache=str(tmp_path / "file" / "cache")))


def test_readers_of_their_own(s3: S3, local: Path, url: str, tmp_path: Path) -> None:
    """Readers are forked from a server; none inherits a client, though this process has used one before."""
    script = f"""
        import sys, torch
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from pathlib import Path
        from test_remote import BatchPlan, feature_batches, from_disk, opened, samples, storage

        def epoch(data, workers):
            batches = feature_batches(data, BatchPlan(1, 1), text_len=512, seed=0, num_workers=workers)
            found = [next(batches) for _ in range(len(data))]
            batches.close()
            return [(one["sample"], one["latents"], one["text"]) for one in found]

        if __name__ == "__main__":
            data = opened({url!r}, storage(Path({str(tmp_path)!r}), {s3.endpoint!r}))
            samples(data)
            for path in Path({str(tmp_path / "cache")!r}).glob("*/*"):
                path.unlink()
            for found, expected in zip(epoch(data, 2), epoch(from_disk(Path({str(local)!r})), 0), strict=True):
                assert found[0] == expected[0]
                assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
            print("same", len(data))
    """
    (tmp_path / "readers.py").write_text(textwrap.dedent(script))
    words = [sys.executable, str(tmp_path / "readers.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, **s3.environment})
    assert done.returncode == 0 and done.stdout.startswith("same"), done.stderr


def test_reads_of_places(s3: S3, url: str, local: Path, tmp_path: Path) -> None:
    remote = location_of(url, storage(tmp_path, s3.endpoint))
    assert isinstance(remote, Remote) and location_of(f"file://{local}", Storage()) == local
    assert sorted(names_in(remote)) == sorted(names_in(local))
    assert names_in(remote / "nothing") == names_in(local / "nothing") == []
    assert exists(remote / "recipe.json") and not exists(remote / "recipe")
    assert read_bytes(remote / "recipe.json") == read_bytes(local / "recipe.json")
    for place in (remote, local):
        with pytest.raises(FileNotFoundError):
            read_bytes(place / "nothing")


def test_half_a_store_is_none(s3: S3, local: Path, tmp_path: Path) -> None:
    """Until its manifest is there: it is put last."""
    (local / "manifest.json").unlink()
    with pytest.raises(DataError, match="DATA-186"):
        opened(s3.upload(local, f"{tmp_path.name}/half"), storage(tmp_path, s3.endpoint))
