"""The cache of what was read in object storage: one fetch, its bounds, its damage, and the processes that share it."""

import multiprocessing
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from object_storage import S3, Proxy
from remote_stores import assert_same, from_disk, opened, samples, storage
from shard_stores import SEED, random_shards, write_shards

from mm.data.remote.cache import Cache
from mm.errors import DataError

pytestmark = pytest.mark.usefixtures("credentials")


def test_what_is_read_twice_is_fetched_once(store: Path, url: str, proxy: Proxy, tmp_path: Path) -> None:
    how = storage(tmp_path, proxy.endpoint)
    samples(opened(url, how))
    first = len([line for line in proxy.requests if "body.bin" in line or "index.bin" in line or "catalog" in line])
    assert first > 0
    proxy.requests.clear()
    assert_same(opened(url, how), from_disk(store))
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


def test_a_damaged_cache_mends_itself(s3: S3, store: Path, url: str, tmp_path: Path) -> None:
    how = storage(tmp_path, s3.endpoint)
    samples(opened(url, how))
    draw = random.Random(0)
    for path in (path for path in (tmp_path / "cache").rglob("*") if path.is_file()):
        damaged = bytearray(path.read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged[: draw.choice([0, len(damaged) // 2, len(damaged)])])
    assert_same(opened(url, how), from_disk(store))


def test_two_stores_share_a_cache(s3: S3, store: Path, url: str, tmp_path: Path) -> None:
    write_shards(tmp_path / "new", random_shards(SEED + 1))
    other = s3.upload(tmp_path / "new", f"{tmp_path.name}/new")
    how = storage(tmp_path, s3.endpoint)
    first, second = opened(url, how), opened(other, how)
    for _ in range(2):
        assert_same(first, from_disk(store))
        assert_same(second, from_disk(tmp_path / "new"))


def test_the_cache_is_bounded(s3: S3, store: Path, url: str, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in store.rglob("*.bin"))
    most = whole // 3
    how = storage(tmp_path, s3.endpoint, cache_gigabytes=most / 10**9)
    data = opened(url, how)
    largest = max(sum(blob.length for blob in data.place(i).blobs or ()) for i in range(len(data)))
    for index in range(len(data)):
        assert torch.equal(data[index]["latents"], from_disk(store)[index]["latents"])
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


@pytest.mark.nightly
def test_readers_of_their_own(s3: S3, store: Path, url: str, tmp_path: Path) -> None:
    """Readers are forked from a server; none inherits a client, though this process has used one before."""
    script = f"""
        import sys, torch
        sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
        from pathlib import Path
        from remote_stores import from_disk, opened, samples, storage
        from mm.data.loader import feature_batches
        from mm.data.sampler import BatchPlan

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
            for found, expected in zip(epoch(data, 2), epoch(from_disk(Path({str(store)!r})), 0), strict=True):
                assert found[0] == expected[0]
                assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
            print("same", len(data))
    """
    (tmp_path / "readers.py").write_text(textwrap.dedent(script))
    words = [sys.executable, str(tmp_path / "readers.py")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={**os.environ, **s3.environment})
    assert done.returncode == 0 and done.stdout.startswith("same"), done.stderr
