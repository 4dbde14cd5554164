"""Reading of clips, in frames a second, beside another version of the reader and beside decord.

    git show REVISION:mm/data/video.py > before.py
    python benchmarks/video_reading.py --before before.py [--rounds 20] [--real FOLDER]

A clip is what extraction reads: one opening of the file (`probe`) and 49 frames from a drawn start. Each round times
one clip with every reader, in turns that rotate, so that what else the machine does meets all alike. Ratios are of
frames a second, above 1 is faster; medians of the rounds' ratios. The other version reads with its own default. Mind
that it may give wrong frames; "fails" is an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from mm.data import video  # noqa: E402  (the path above)

FRAMES = 49
Read = Callable[[Path, int], None]
KINDS: dict[str, tuple[str, str, int, int, dict[str, str]]] = {  # name: file, codec, height, num_frames, options
    "mp4, H.264, keyint 250": ("a.mp4", "libx264", 480, 300, {}),
    "mp4, H.264, keyint 48": ("b.mp4", "libx264", 480, 300, {"g": "48"}),
    "mp4, H.264, keyint 48, 720p": ("c.mp4", "libx264", 720, 300, {"g": "48"}),
    "mp4, H.264, keyint 48, 3000 frames": ("d.mp4", "libx264", 240, 3000, {"g": "48"}),
    "mp4, H.265, x265's defaults": ("e.mp4", "libx265", 480, 300, {"x265-params": "log-level=error"}),
    "mkv, H.264, keyint 48": ("f.mkv", "libx264", 480, 300, {"g": "48"}),
    "webm, VP9, keyint 48": ("g.webm", "libvpx-vp9", 480, 300, {"g": "48", "cpu-used": "8", "deadline": "realtime"}),
    "mp4, AV1, keyint 48": ("h.mp4", "libsvtav1", 480, 300, {"g": "48", "preset": "12"}),
    "ts, H.264, keyint 48": ("i.ts", "libx264", 480, 300, {"g": "48"}),
    "avi, Xvid": ("j.avi", "mpeg4", 480, 300, {"bf": "2", "q": "4"}),
    "mpg, MPEG-2": ("k.mpg", "mpeg2video", 480, 300, {"bf": "2", "q": "4"}),
}


def write(path: Path, codec: str, height: int, num_frames: int, options: dict[str, str]) -> None:
    """A drifting texture with a little noise, 16:9 in size."""
    width = height * 16 // 9 // 16 * 16
    random_numbers = np.random.default_rng(0)
    texture = random_numbers.integers(0, 255, (height // 8, width // 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            place = 3 * number % width
            pixels = texture[:, place : place + width] // 2 + random_numbers.integers(
                0, 8, (height, width, 1), np.uint8
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))))
        container.mux(stream.encode())
    os.sched_setscheduler(0, policy, parameters)  # libsvtav1 makes the thread that opens it a real-time one


def reader(module: ModuleType, name: str | None) -> Read:
    """A clip through a version of `mm.data.video`; `name` asks for one of its libraries."""

    def read(file: Path, start: int) -> None:
        arguments: list[Any] = [name] if name else []
        info = module.probe(file, *arguments)
        count = sum(len(chunk) for chunk in module.read_frames(file, info, range(start, start + FRAMES), *arguments))
        assert count == FRAMES

    return read


def measure(file: Path, readers: dict[str, Read], rounds: int) -> dict[str, list[float]]:
    """Seconds of a clip by reader, one each round; a reader that fails has none."""
    num_frames = video.probe(file).num_frames
    starts = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(-1, rounds):
        start = int(starts.integers(num_frames - FRAMES + 1))
        names = list(readers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            try:
                readers[name](file, start)
            except Exception:
                seconds[name].append(float("nan"))
                continue
            if number >= 0:  # the first round warms caches
                seconds[name].append(time.perf_counter() - began)
    return {name: values for name, values in seconds.items() if not np.isnan(values).any()}


def load(path: Path) -> ModuleType:
    """A module from a file anywhere."""
    spec = importlib.util.spec_from_file_location("before", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table: frames a second of this version, and its ratio to each other reader."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="mm/data/video.py of another version")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--real", type=Path, help="a folder of videos to read too")
    flags = parser.parse_args(argv)
    readers = {"this": reader(video, None)}
    if flags.before:
        readers["before"] = reader(load(flags.before), None)
    if importlib.util.find_spec("decord"):
        readers["decord, checked"] = reader(video, "decord")
    print("| video | frames/s | " + " | ".join(f"ratio to {name}" for name in readers if name != "this") + " |")
    print("| --- " * (1 + len(readers)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (file, codec, height, num_frames, options) in KINDS.items():
            write(Path(folder) / file, codec, height, num_frames, options)
            _row(name, measure(Path(folder) / file, readers, flags.rounds), readers)
    for path in sorted(flags.real.iterdir()) if flags.real else ():
        if video.probe(path).num_frames > FRAMES:
            _row(path.name, measure(path, readers, flags.rounds), readers)


def _row(name: str, seconds: dict[str, list[float]], readers: dict[str, Read]) -> None:
    mine = seconds["this"]
    cells = [f"{FRAMES / statistics.median(mine):.0f}"]
    for other in readers:
        if other == "this":
            continue
        ratios = [b / a for a, b in zip(mine, seconds.get(other, []), strict=False)]
        cells.append(f"{statistics.median(ratios):.2f}" if ratios else "fails")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
