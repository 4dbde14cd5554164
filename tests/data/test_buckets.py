"""SimpleTuner's entries of the type aws: files of a bucket as local ones."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from feature_samples import write_clip
from object_storage import BUCKET, S3, proxy_before, status

from mm.config.data import DataSource
from mm.config.storage import Storage
from mm.data.sources.checking import check_rows
from mm.errors import DataError


@pytest.fixture(autouse=True)
def environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def films(s3: S3, tmp_path: Path) -> Path:
    """Clips with captions, on disk and in the bucket below `NAME/set`."""
    for name in ("b.mp4", "sub/a c.mp4"):
        write_clip(tmp_path / "set" / name)
        (tmp_path / "set" / name).with_suffix(".txt").write_text(f"caption of {name}")
    s3.upload(tmp_path / "set", f"{tmp_path.name}/set")
    return tmp_path / "set"


def read(tmp_path: Path, endpoint: str, cache: str = "cache", gigabytes: float = 1.0, **entry: Any) -> list[Any]:
    said = {"id": "films", "dataset_type": "video", "caption_strategy": "textfile", "video": {"num_frames": 5}}
    bucket = {"type": "aws", "aws_bucket_name": BUCKET, "aws_data_prefix": tmp_path.name}
    path = tmp_path / "multidatabackend.json"
    path.write_text(json.dumps([{**said, **bucket, "aws_endpoint_url": endpoint, **entry}]))
    storage = Storage(cache=str(tmp_path / cache), cache_gigabytes=gigabytes, give_up_after=0.5)
    rows = check_rows([DataSource(tmp_path, path, "simpletuner", storage=storage)])
    assert not [problem for row in rows for problem in row.problems]
    return [row.sample for row in rows]


def test_a_bucket_is_read_as_its_folder_would_be(s3: S3, films: Path, tmp_path: Path) -> None:
    local = read(tmp_path, s3.endpoint, type="local", instance_data_dir=str(films))
    for said in ({"instance_data_dir": "set"}, {"aws_data_prefix": f"{tmp_path.name}/set/"}):
        found = read(tmp_path, s3.endpoint, **said)
        assert [(s.id, s.captions) for s in found] == [(s.id, s.captions) for s in local] and len(found) == 2
        assert [s.file.read_bytes() for s in found] == [s.file.read_bytes() for s in local]


def test_files_are_downloaded_once_and_again_where_they_changed(s3: S3, films: Path, tmp_path: Path) -> None:
    with proxy_before(s3) as proxy:

        def fetched() -> set[str]:
            proxy.requests.clear()
            read(tmp_path, proxy.endpoint, instance_data_dir="set")
            return {one.partition("/set/")[2] for one in proxy.requests if one.startswith("GET") and "/set/" in one}

        assert fetched() == {"b.mp4", "b.txt", "sub/a%20c.mp4", "sub/a%20c.txt"}
        assert fetched() == set()
        changed = s3.get(f"{tmp_path.name}/set/b.txt").replace(b"b", b"d")
        s3.put(f"{tmp_path.name}/set/b.txt", changed)
        assert fetched() == {"b.txt"}
        for kept in (tmp_path / "cache").rglob("b.mp4"):
            os.truncate(kept, 9)
        assert fetched() == {"b.mp4"}
        for name in ("b.mp4", "b.txt"):
            s3.client.delete_object(Bucket=BUCKET, Key=f"{tmp_path.name}/set/{name}")
        assert fetched() == set() and len(read(tmp_path, proxy.endpoint, instance_data_dir="set")) == 1


def test_of_several_one_downloads(s3: S3, films: Path, tmp_path: Path) -> None:
    with proxy_before(s3) as proxy:
        readers = [threading.Thread(target=read, args=(tmp_path, proxy.endpoint)) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert len([one for one in proxy.requests if one.startswith("GET") and one.endswith("b.mp4")]) == 1
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def test_what_cannot_be_read(s3: S3, films: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DATA-183: s3://nowhere/.*its bucket does not exist"):
        read(tmp_path, s3.endpoint, aws_bucket_name="nowhere")
    with pytest.raises(DataError, match=r"DATA-173: .* entry films: nothing lies below s3://"):
        read(tmp_path, s3.endpoint, instance_data_dir="none")
    with pytest.raises(DataError, match=r"DATA-188: .* entry films: 4 objects below s3://.* the cache may hold"):
        read(tmp_path, s3.endpoint, instance_data_dir="set", gigabytes=1e-6)
    s3.put(f"{tmp_path.name}/odd/../../x.mp4", b"x")
    with pytest.raises(DataError, match=r'DATA-063: .*holds "\.\."'):
        read(tmp_path, s3.endpoint, instance_data_dir="odd")
    with proxy_before(s3) as proxy:
        proxy.fail(status(403, "AccessDenied"))
        with pytest.raises(DataError, match="DATA-182"):
            read(tmp_path, proxy.endpoint)
        proxy.fail(status(500, "InternalError"), "b.mp4")
        with pytest.raises(DataError, match=r"DATA-185: s3://.*b\.mp4"):
            read(tmp_path, proxy.endpoint, instance_data_dir="set")
    assert not [path for path in (tmp_path / "cache").rglob("*.mp4") if path.stat().st_size == 0]
    shutil.rmtree(tmp_path / "cache")
    assert len(read(tmp_path, s3.endpoint, instance_data_dir="set")) == 2


def test_no_credentials(s3: S3, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"DATA-181: s3://.*there are no credentials"):
        read(tmp_path, s3.endpoint, aws_region_name="eu-west-1")
