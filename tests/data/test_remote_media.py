"""Files of tables that are named by the addresses of objects, from a real S3 server on loopback."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from annotated import check_rows
from feature_samples import write_clip
from object_storage import BUCKET, S3, proxy_before, status
from PIL import Image

from mm.config.data import DataSource, SourceFormat
from mm.config.run.extraction import SourceClip
from mm.config.run.shapes import FrameRule
from mm.config.storage import Storage
from mm.config.tasks.registry import TASKS
from mm.data.clips import load_clip
from mm.data.metadata import VideoSample
from mm.data.probe_cache import ProbeCache
from mm.data.probing import probe_samples
from mm.errors import DataError
from mm.extract.rows import source_word

CLIP = SourceClip(num_frames=5, height=32, width=48, frames=FrameRule(start="first"))
TABLES: dict[SourceFormat, tuple[str, str]] = {
    "mindspeed": ("path", "cap"),
    "videox-fun": ("file_path", "text"),
    "diffsynth": ("video", "prompt"),
    "hf-folder": ("file_name", "text"),
}


@pytest.fixture(autouse=True)
def environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def address(s3: S3, tmp_path: Path) -> str:
    """Two clips and an image, on disk and in the bucket."""
    for name in ("a.mp4", "sub/b.mp4"):
        write_clip(tmp_path / "set" / name)
    Image.effect_noise((48, 32), 90).convert("RGB").save(tmp_path / "set" / "c.png")
    return s3.upload(tmp_path / "set", f"{tmp_path.name}/set")


def listed(
    tmp_path: Path, endpoint: str, rows: list[dict[str, Any]], format: SourceFormat = "mindspeed", **storage: Any
) -> list[VideoSample]:
    path = tmp_path / ("metadata.jsonl" if format in ("mindspeed", "hf-folder") else "metadata.csv")
    with open(path, "w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(file, [*rows[0]])
            table.writeheader()
            table.writerows(rows)
    how = {"cache": str(tmp_path / "cache"), "endpoint_url": endpoint, "give_up_after": 0.5, **storage}
    source = DataSource(tmp_path, path, format, storage=Storage(**how))
    found = check_rows([source], TASKS["fun_control"] if "control" in rows[0] else None)
    problems = [problem for row in found for problem in row.problems]
    if problems:
        raise DataError(problems[0].id, problems[0].message, problems[0].remedy)
    return [row.sample for row in found if row.sample is not None]


@pytest.mark.parametrize("format", [*TABLES])
def test_objects_are_read_as_files_would_be(format: SourceFormat, s3: S3, address: str, tmp_path: Path) -> None:
    path, caption = TABLES[format]
    for name in ("a.mp4", "sub/b.mp4"):
        (remote,) = listed(tmp_path, s3.endpoint, [{path: f"{address}/{name}", caption: "x"}], format)
        (local,) = listed(tmp_path, s3.endpoint, [{path: f"set/{name}", caption: "x"}], format)
        assert remote.where == f"{address}/{name}" and not remote.file.exists(), "nothing is fetched before it is read"
        assert torch.equal(load_clip(remote, CLIP, 1).pixels, load_clip(local, CLIP, 1).pixels)
        assert remote.file.read_bytes() == local.file.read_bytes()


def test_images_and_files_beside_a_clip(s3: S3, address: str, tmp_path: Path) -> None:
    (image,) = listed(tmp_path, s3.endpoint, [{"file_path": f"{address}/c.png", "text": "x"}], "videox-fun")
    assert image.kind == "image" and load_clip(image, CLIP, 1).pixels.shape == (3, 1, 32, 48)
    media = TASKS["fun_control"].media
    pixels = []
    for place in ("set", address):
        row = {"path": "set/a.mp4", "cap": "x", "control": f"{place}/sub/b.mp4"}
        (sample,) = listed(tmp_path, s3.endpoint, [row])
        pixels.append(load_clip(sample, CLIP, 1, media=media).beside["control"])
    assert torch.equal(*pixels)


def test_an_object_is_fetched_once_and_again_where_it_is_another(s3: S3, address: str, tmp_path: Path) -> None:
    rows = [{"path": f"{address}/a.mp4", "cap": "x"}]
    with proxy_before(s3) as proxy:

        def fetched() -> int:
            proxy.requests.clear()
            (sample,) = listed(tmp_path, proxy.endpoint, rows)
            load_clip(sample, CLIP, 1)
            return len([one for one in proxy.requests if one.startswith("GET") and one.endswith("a.mp4")])

        (before,) = listed(tmp_path, proxy.endpoint, rows)
        assert (fetched(), fetched()) == (1, 0)
        s3.put(f"{tmp_path.name}/set/a.mp4", s3.get(f"{tmp_path.name}/set/sub/b.mp4") + b"more")
        (after,) = listed(tmp_path, proxy.endpoint, rows)
        assert source_word(after) != source_word(before) and (fetched(), fetched()) == (1, 0)
        before.file.unlink()
        with pytest.raises(DataError, match=rf"DATA-262: {address}/a\.mp4 is another object than when it was listed"):
            load_clip(before, CLIP, 1)
    assert not [*(tmp_path / "cache").glob(".tmp-*")]


def test_sizes_of_objects_are_kept(s3: S3, address: str, tmp_path: Path) -> None:
    public = s3.publish(tmp_path / "set", "public-media")
    rows = [{"path": f"{public}/{name}", "cap": "x"} for name in ("a.mp4", "sub/b.mp4")]
    with proxy_before(s3) as proxy:
        found = []
        for cache in ("one", "another"):
            samples = listed(tmp_path, proxy.endpoint, rows, cache=str(tmp_path / cache), anonymous=True)
            proxy.requests.clear()
            with ProbeCache(tmp_path / "sizes.db") as sizes:
                told = probe_samples(samples, sizes, reader="pyav", num_workers=1, time_limit=60)
                found.append([facts for _, facts in told])
        assert found[0] == found[1] and not isinstance(found[0][0], DataError) and not proxy.requests


def test_what_cannot_be_read(s3: S3, address: str, tmp_path: Path) -> None:
    def row(path: str) -> list[dict[str, Any]]:
        return [{"path": path, "cap": "x"}]

    for path, expected in (
        (f"{address}/none.mp4", rf"DATA-001: \S+metadata.jsonl row 1.*: {address}/none\.mp4 does not exist"),
        (f"{address}/sub", "DATA-001"),
        ("s3://nowhere/a.mp4", "DATA-183"),
        ("s3://", "DATA-063"),
        (f"s3://{BUCKET}/../a.mp4", "DATA-063"),
        ("https://host/a.mp4", "DATA-063"),
    ):
        with pytest.raises(DataError, match=expected):
            listed(tmp_path, s3.endpoint, row(path))
    (sample,) = listed(tmp_path, s3.endpoint, row(f"{address}/a.mp4"), cache_gigabytes=1e-9)
    with pytest.raises(DataError, match=rf"DATA-263: {address}/a\.mp4 was fetched 3 times"):
        load_clip(sample, CLIP, 1)
    s3.put(f"{tmp_path.name}/set/bad.mp4", b"no video")
    (bad,) = listed(tmp_path, s3.endpoint, row(f"{address}/bad.mp4"))
    with pytest.raises(DataError, match=rf"DATA-002: .*{address}/bad\.mp4"):
        load_clip(bad, CLIP, 1)
    with proxy_before(s3) as proxy:
        (sample,) = listed(tmp_path, proxy.endpoint, row(f"{address}/a.mp4"), give_up_after=20.0)
        proxy.fail(status(503, "SlowDown"), "a.mp4", times=2)
        assert load_clip(sample, CLIP, 1).pixels.shape[1] == 5, "what passes is tried again"
        os.unlink(sample.file)
        proxy.fail(status(403, "AccessDenied"), "a.mp4")
        with pytest.raises(DataError, match="DATA-182"):
            load_clip(sample, CLIP, 1)
