"""Clips whose frames carry their number, in many containers and codecs, and what a plain decode of them shows.

A number stands in binary, least bit first, as a row of light and dark squares along the top. Below it a pattern drifts,
so that inter prediction has work to do.
"""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

HEIGHT, WIDTH = 64, 144
BITS, SIDE = 9, 16


def draw(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame, uint8 [height, width, 3]."""
    rows, columns = np.mgrid[:height, :width]
    frame = np.stack([(columns * (c + 2) + 3 * number) % 200 // 8 * 8 + rows % (c + 5) for c in range(3)], -1)
    for bit in range(BITS):
        frame[:SIDE, bit * SIDE : (bit + 1) * SIDE] = 235 if number >> bit & 1 else 16
    return frame.astype(np.uint8)


def number_of(frame: np.ndarray) -> int:
    """The number that a decoded frame carries."""
    squares = frame[4 : SIDE - 4, : BITS * SIDE].reshape(-1, BITS, SIDE, 3)[:, :, 4:-4].mean(axis=(0, 2, 3))
    return sum(1 << bit for bit, light in enumerate(squares) if light > 128)


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """Give this thread the scheduling policy back that it had.

    libsvtav1, where it may (as root), makes the thread that opens it a real-time one, for which every other process of
    the machine must wait; what that thread starts later inherits it.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_numbered(
    file: Path,
    num_frames: int = 60,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    *,
    options: dict[str, str] | None = None,
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    pixel_aspect: Fraction | None = None,
) -> Path:
    """Encode frames 0, 1, ... at 25 a second, or at `times` in units of 1/25 s."""
    with (
        scheduling_kept(),
        av.open(str(file), "w", format=container_format, options=container_options or {}) as container,
    ):
        stream = container.add_stream(codec, rate=25, options=options or {})
        (stream.height, stream.width), stream.pix_fmt = size, pixel_format
        if pixel_aspect is not None:
            stream.sample_aspect_ratio = pixel_aspect
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(number, *size))
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def plain_decode(file: Path) -> np.ndarray:
    """Every frame in order, decoded from the start without any seeking: uint8 [F, H, W, 3]."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def remux(source: Path, target: Path, change: Callable[[int, av.Packet], bool], name: str | None = None) -> Path:
    """Copy packets; `change` may alter each (by its number) and says whether it is kept."""
    with av.open(str(source)) as old, av.open(str(target), "w", format=name) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.dts is not None and change(number, packet):
                packet.stream = stream
                new.mux(packet)
    return target


def with_edits(source: Path, target: Path, edits: Sequence[tuple[int, int]]) -> Path:
    """An mp4 with another edit list: (first frame, or -1 for a pause, and number of frames) each."""
    content = bytearray(source.read_bytes())
    place = content.find(b"elst")
    (size,) = struct.unpack_from(">I", content, place - 4)
    (origin,) = struct.unpack_from(">i", content, place + 16)
    (movie_scale,) = struct.unpack_from(">I", content, content.find(b"mvhd") + 16)
    (media_scale,) = struct.unpack_from(">I", content, content.find(b"mdhd") + 16)
    entries = b"".join(
        struct.pack(">IiI", count * movie_scale // 25, -1 if first < 0 else origin + first * media_scale // 25, 1 << 16)
        for first, count in edits
    )
    box = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    content[place - 4 : place - 4 + size] = box
    for name in (b"moov", b"trak", b"edts"):  # which hold it
        outer = content.find(name) - 4
        struct.pack_into(">I", content, outer, struct.unpack_from(">I", content, outer)[0] + len(box) - size)
    assert content.find(b"mdat") < content.find(b"moov"), "what stands behind the list must not move"
    target.write_bytes(content)
    return target


def with_matrix(source: Path, target: Path, matrix: Sequence[float]) -> Path:
    """An mp4 whose track header has the matrix a, b, c, d (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(source.read_bytes())
    a, b, c, d = (round(value * (1 << 16)) for value in matrix)
    struct.pack_into(">9i", content, content.find(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(content)
    return target


def with_cover(target: Path, tracks: Sequence[Path]) -> Path:
    """An MP4 file of the first tracks of some files, with a picture of its contents as music and films have them.

    The picture stands before the tracks, as some tools have it.
    """
    picture = target.with_name("cover.png")
    write_numbered(picture, 1, "png", "rgb24", container_format="image2", container_options={"update": "1"})
    sources = [av.open(str(file)) for file in (*tracks, picture)]
    with av.open(str(target), "w", format="mp4") as container:
        pairs = [(source, container.add_stream_from_template(source.streams[0])) for source in sources]
        pairs[-1][1].disposition = Disposition.attached_pic
        for source, stream in pairs:
            for packet in source.demux(source.streams[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    container.mux(packet)
    for source in sources:
        source.close()
    content = bytearray(target.read_bytes())
    track, about = content.find(b"trak") - 4, content.find(b"udta") - 4
    (size,) = struct.unpack_from(">I", content, about)
    content[track : about + size] = content[about : about + size] + content[track:about]
    target.write_bytes(content)
    return target


@dataclass(frozen=True)
class Kind:
    """A combination of container and codec; `begins` and `decord` are what docs/data.md says of it.

    begins: "key" where decoding begins at the last closed key frame, "start" where at the first frame, "whole" where
    the video is decoded whole once to count its frames, too. decord: whether it may read it.
    """

    name: str
    file: str
    begins: str
    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)
    container_format: str | None = None
    container_options: dict[str, str] = field(default_factory=dict)
    num_frames: int = 60
    decord: bool = False

    def write(self, folder: Path) -> Path:
        return write_numbered(
            folder / self.file,
            self.num_frames,
            self.codec,
            self.pixel_format,
            options=self.options,
            container_format=self.container_format,
            container_options=self.container_options,
        )


GOP = {"g": "20"}
X265, X265_20 = {"x265-params": "log-level=error"}, {"x265-params": "log-level=error:keyint=20"}
REFRESH = {"x264-params": "keyint=12:intra-refresh=1:bframes=0"}
B_FRAMES = {"bf": "2", "q": "3", "g": "12"}
OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"}
VP9 = {"g": "20", "cpu-used": "8", "deadline": "realtime"}
AV1 = {"g": "20", "preset": "12"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}

KINDS = [
    Kind("H.264", "a.mp4", "key", options=GOP, decord=True),
    Kind("H.264, B pyramid", "pyramid.mp4", "key", options={"x264-params": "keyint=30:bframes=8:ref=5"}, decord=True),
    Kind("H.264, x264's defaults", "defaults.mp4", "key", num_frames=280, decord=True),
    Kind("H.264, open GOP", "open.mp4", "start", options=OPEN_GOP),
    Kind("H.264, intra refresh", "refresh.mp4", "start", options=REFRESH),
    Kind("H.264, interlaced", "interlaced.mp4", "whole", options={"x264-params": "tff=1:keyint=20"}),
    Kind("H.264, 10 bit", "ten.mp4", "key", pixel_format="yuv420p10le", options=GOP),
    Kind("H.264, 4:4:4", "444.mp4", "key", pixel_format="yuv444p", options=GOP, decord=True),
    Kind("H.264, fragments", "fragments.mp4", "key", options=GOP, container_options=FRAGMENTS),
    Kind("H.264", "a.mov", "key", options=GOP, decord=True),
    Kind("H.264", "a.mkv", "key", options=GOP),
    Kind("H.264", "a.ts", "key", options=GOP),
    Kind("H.264", "a.flv", "key", options=GOP),
    Kind("H.264", "a.avi", "whole", options=GOP),
    Kind("H.264, no container", "a.h264", "whole", options=GOP, container_format="h264"),
    Kind("H.265, x265's defaults", "x265.mp4", "key", "libx265", options=X265, num_frames=280),
    Kind("H.265, keyint 20", "a265.mkv", "key", "libx265", options=X265_20),
    Kind("H.265, keyint 20", "a265.ts", "key", "libx265", options=X265_20),
    Kind("H.265, 10 bit", "ten265.mp4", "key", "libx265", "yuv420p10le", X265_20),
    Kind("Xvid (MPEG-4 part 2)", "xvid.avi", "whole", "mpeg4", options=B_FRAMES),
    Kind("Xvid (MPEG-4 part 2)", "xvid.mp4", "whole", "mpeg4", options=B_FRAMES),
    Kind("MPEG-2", "a.mpg", "whole", "mpeg2video", options=B_FRAMES, container_format="mpeg"),
    Kind("MPEG-2", "a.vob", "whole", "mpeg2video", options=B_FRAMES, container_format="vob"),
    Kind("MPEG-2", "mpeg2.ts", "whole", "mpeg2video", options=B_FRAMES),
    Kind("MPEG-2, no container", "a.m2v", "whole", "mpeg2video", options=B_FRAMES, container_format="mpeg2video"),
    Kind("WMV 8", "a.wmv", "whole", "wmv2", options={"q": "3"}, container_format="asf"),
    Kind("Sorenson H.263", "sorenson.flv", "whole", "flv"),
    Kind("VP8", "vp8.webm", "key", "libvpx", options={"g": "20", "cpu-used": "5"}),
    Kind("VP9", "a.webm", "key", "libvpx-vp9", options=VP9),
    Kind("VP9", "vp9.mp4", "key", "libvpx-vp9", options=VP9),
    Kind("AV1", "av1.mp4", "key", "libsvtav1", options=AV1),
    Kind("AV1", "av1.mkv", "key", "libsvtav1", options=AV1),
    Kind("MJPEG", "mjpeg.avi", "key", "mjpeg", "yuvj420p"),
    Kind("ProRes", "prores.mov", "key", "prores_ks", "yuv422p10le"),
    Kind("FFV1", "ffv1.mkv", "whole", "ffv1"),
]
