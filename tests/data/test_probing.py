"""Sizes of media against PyAV and Pillow, and the file that keeps them: kills, several writers, damage."""

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import pytest
from feature_samples import write_clip, write_data_set, write_encoders
from PIL import Image

from mm.cli.doctor_data import main as doctor_data
from mm.data.metadata import Annotation, VideoSample
from mm.data.probe_cache import ProbeCache, identity_of
from mm.data.probing import MediaFacts, probe_samples
from mm.errors import ConfigError, DataError


def samples_of(*files: Path) -> list[VideoSample]:
    return [
        VideoSample(
            file.name,
            file,
            ("x",),
            Annotation(path=file.name, cap="x"),
            kind="image" if file.suffix == ".png" else "video",
        )
        for file in files
    ]


def probed(cache: ProbeCache, *files: Path, num_workers: int = 0) -> list[MediaFacts | DataError]:
    found = probe_samples(samples_of(*files), cache, reader="auto", num_workers=num_workers, time_limit=60)
    return [facts for _, facts in found]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(6):
        if number % 2:
            made.append(tmp_path / f"{number}.png")
            Image.new("RGB", (10 + number, 20)).save(made[-1])
        else:
            made.append(write_clip(tmp_path / f"{number}.mp4", num_frames=4 + number, height=32, width=48))
    (tmp_path / "broken.mp4").write_bytes(b"x")
    return [*made[:3], tmp_path / "broken.mp4", *made[3:]]


def truth(file: Path) -> MediaFacts | None:
    if file.name == "broken.mp4":
        return None
    if file.suffix == ".png":
        with Image.open(file) as image:
            return MediaFacts(1, image.height, image.width)
    with av.open(str(file)) as container:
        frames = list(container.decode(video=0))
    return MediaFacts(len(frames), frames[0].height, frames[0].width)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_facts_in_order_known_or_not(num_workers: int, files: list[Path], tmp_path: Path) -> None:
    """Whichever of them the cache knows, and without opening those."""
    expected = [truth(file) for file in files]
    for known in ([], [0, 3, 4], [2, 5, 6], range(7)):
        path = tmp_path / f"cache {list(known)} {num_workers}"
        with ProbeCache(path) as cache:
            probed(cache, *(files[number] for number in known))
        with ProbeCache(path) as cache:
            found = probed(cache, *files, num_workers=num_workers)
        assert [facts if isinstance(facts, MediaFacts) else None for facts in found] == expected
        assert isinstance(found[3], DataError) and found[3].id == "DATA-002"


def test_what_is_known_is_not_opened(files: list[Path], tmp_path: Path) -> None:
    """The content is gone and the identity is not: what comes was kept."""
    with ProbeCache(tmp_path / "cache") as cache:
        (before,) = probed(cache, files[0])
    then = files[0].stat()
    with files[0].open("r+b") as file:
        file.write(bytes(then.st_size))
    os.utime(files[0], ns=(then.st_atime_ns, then.st_mtime_ns))
    with ProbeCache(tmp_path / "cache") as cache:
        assert probed(cache, files[0]) == [before]
        os.utime(files[0], ns=(then.st_atime_ns, then.st_mtime_ns + 1))
        (after,) = probed(cache, files[0])
    assert isinstance(after, DataError)


def test_another_file_at_the_path_is_asked_anew(files: list[Path], tmp_path: Path) -> None:
    with ProbeCache(tmp_path / "cache") as cache:
        assert probed(cache, files[0]) == [truth(files[0])]
        write_clip(files[0], num_frames=9, height=48, width=32)
        assert probed(cache, files[0]) == [MediaFacts(9, 48, 32)]


def count(path: Path) -> int:
    with sqlite3.connect(path) as connection:
        return int(connection.execute("SELECT count(*) FROM facts").fetchone()[0])


WRITER = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from mm.data.probe_cache import ProbeCache
with ProbeCache(Path(sys.argv[1])) as cache:
    print("ready", flush=True)
    for number in range(int(sys.argv[3])):
        cache.put(f"{sys.argv[2]}-{number}", (number, 1, 2))
"""


def write_many(path: Path, name: str, rows: int) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", WRITER, str(path), name, str(rows)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    writers = [write_many(tmp_path / "cache", name, 2000) for name in "abc"]
    assert [writer.wait(120) for writer in writers] == [0, 0, 0]
    with ProbeCache(tmp_path / "cache") as cache:
        found = [cache.get(f"{name}-{number}") for name in "abc" for number in (0, 1999)]
    assert found == [(0, 1, 2), (1999, 1, 2)] * 3 and count(tmp_path / "cache") == 6000


def test_several_make_it_at_once(tmp_path: Path) -> None:
    """Whoever finds a table that another one has just made finds whose it is, too."""
    count, barrier = 8, threading.Barrier(8)

    def open_it(path: Path) -> None:
        barrier.wait(60)
        with ProbeCache(path):
            pass

    with ThreadPoolExecutor(count) as threads:
        for number in range(40):
            for opened in [threads.submit(open_it, tmp_path / str(number)) for _ in range(count)]:
                opened.result()


def test_a_killed_writer_leaves_a_whole_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for delay in (0.0, 0.01, 0.03, 0.1):
        writer = write_many(tmp_path / "cache", f"k{delay}", 10**7)
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(60)
        with ProbeCache(tmp_path / "cache") as cache:
            cache.put(f"after {delay}", (1, 2, 3))
    with ProbeCache(tmp_path / "cache") as cache:
        assert [cache.get(f"after {delay}") for delay in (0.0, 0.01, 0.03, 0.1)] == [(1, 2, 3)] * 4
    with sqlite3.connect(tmp_path / "cache") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert "damaged" not in caplog.text


def fill(path: Path) -> None:
    with ProbeCache(path) as cache:
        for number in range(500):
            cache.put(f"file {number}", (number, 480, 832))


@pytest.mark.parametrize("damage", ["cut off", "pages", "a digit"])
def test_a_damaged_cache_is_made_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Never a wrong number: none, or the one that was kept."""
    path = tmp_path / "cache"
    fill(path)
    content = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(content[:5000])
    elif damage == "pages":
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    else:
        place = content.index(b"file 250") + len("file 250")
        assert content[place : place + 11] == b"250 480 832"
        path.write_bytes(content[:place] + b"9" + content[place + 1 :])
    with ProbeCache(path) as cache:
        found = [cache.get(f"file {number}") for number in range(500)]
        assert all(numbers in (None, (number, 480, 832)) for number, numbers in enumerate(found)) and None in found
        cache.put("new", (1, 2, 3))
    assert sum("is made anew" in message for message in caplog.messages) == 1
    with ProbeCache(path) as cache:
        assert cache.get("new") == (1, 2, 3)


def test_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="DATA-176"):
        ProbeCache(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE facts (mine TEXT)")
    with pytest.raises(DataError, match="DATA-176"):
        ProbeCache(tmp_path / "other")
    for path in (tmp_path, tmp_path / "none" / "cache", tmp_path / ("c" * 300)):
        with pytest.raises(DataError, match="DATA-018"):
            ProbeCache(path)


def test_a_file_that_is_gone_has_no_identity(tmp_path: Path) -> None:
    assert identity_of(tmp_path / "none") is None


def test_the_doctor_counts_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows: list[dict[str, Any]] = [{"path": f"{name}.mp4", "cap": "x"} for name in "abc"]
    annotation = write_data_set(tmp_path / "set", rows, num_frames=14)
    write_clip(tmp_path / "set" / "b.mp4", num_frames=9, height=64, width=48)
    weights = write_encoders(tmp_path / "weights")
    basic = {"data_path": str(annotation), "data_folder": str(tmp_path / "set")}
    param = {"dataset_type": "t2v", "basic_parameters": basic,
             "preprocess_parameters": {"num_frames": 9, "max_height": 32, "max_width": 32},
             "tokenizer_config": {"from_pretrained": str(weights / "tokenizer")}}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps({"dataset_param": param}))
    words = ["--mm-data", str(tmp_path / "data.json"), "--quick", "--probed", str(tmp_path / "cache")]
    for _ in range(2):
        doctor_data([*words, "--output", str(tmp_path / "out")])
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["sizes"] == [
            {"kind": "video", "num_frames": 14, "height": 48, "width": 64, "samples": 2},
            {"kind": "video", "num_frames": 9, "height": 64, "width": 48, "samples": 1},
        ]
        assert count(tmp_path / "cache") == 3
    with pytest.raises(ConfigError, match="CFG-112"):
        doctor_data(words)
