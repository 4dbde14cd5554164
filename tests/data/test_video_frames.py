"""Any frames of any video are those of a plain decode from the start, bit for bit, whichever library was asked for."""

import importlib.util
import random
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from numbered_clips import (
    GOP,
    KINDS,
    OPEN_GOP,
    X265_20,
    Kind,
    draw,
    number_of,
    plain_decode,
    remux,
    with_cover,
    with_edits,
    write_numbered,
)

from mm.data.video import Reader, VideoInfo, probe, read_frames
from mm.errors import DataError
from mm.generate.media_inputs import load_video

HAS_DECORD = importlib.util.find_spec("decord") is not None
READERS: tuple[Reader, ...] = ("pyav", "decord") if HAS_DECORD else ("pyav",)
TABLE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
ROW = re.compile(r"^\| `\.(\w+)` \| ([^|]+) \| (key|start|whole) \| (yes|no) \|$", re.M)


def frames(file: Path, info: VideoInfo, start: int, stop: int, reader: Reader) -> np.ndarray:
    return torch.cat(list(read_frames(file, info, range(start, stop), reader))).permute(0, 2, 3, 1).numpy()


def check(file: Path, num_starts: int, seed: int = 0) -> VideoInfo:
    """Compare clips from drawn starts with a plain decode; returns what decord's check said."""
    plain = plain_decode(file)
    draws = random.Random(seed)
    for reader in READERS:
        info = probe(file, reader)
        assert info.num_frames == len(plain)
        for _ in range(num_starts):
            start = draws.randrange(len(plain))
            stop = min(start + 17, len(plain))
            found = frames(file, info, start, stop, reader)
            numbers = [number_of(frame) for frame in found], [number_of(frame) for frame in plain[start:stop]]
            assert np.array_equal(found, plain[start:stop]), f"{file.name}: {reader} from {start}: {numbers}"
    return info


def begins(info: VideoInfo) -> str:
    return "whole" if info.order is None else "key" if len(info.order.starts) > 1 else "start"


def test_numbers_can_be_read_back(tmp_path: Path) -> None:
    assert [number_of(draw(number)) for number in range(512)] == list(range(512))
    assert [number_of(frame) for frame in plain_decode(write_numbered(tmp_path / "a.mp4"))] == list(range(60))


def test_the_table_has_these_kinds_and_no_others() -> None:
    documented = [(extension, name.strip(), b, d) for extension, name, b, d in ROW.findall(TABLE)]
    assert documented == [
        (kind.file.split(".")[-1], kind.name, kind.begins, "yes" if kind.decord else "no") for kind in KINDS
    ]
    assert len(KINDS) >= 25


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file)
def test_frames_of_every_kind(kind: Kind, tmp_path: Path) -> None:
    info = check(kind.write(tmp_path), num_starts=3)
    assert begins(info) == kind.begins
    assert (info.read_by == "decord") == (kind.decord and HAS_DECORD)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file)
def test_frames_of_every_kind_from_forty_starts(kind: Kind, tmp_path: Path) -> None:
    check(kind.write(tmp_path), num_starts=40, seed=1)


EDITS = {
    "the start is left out": [(13, 40)],
    "the end is left out": [(0, 30)],
    "both, between key frames": [(27, 9)],
    "a pause first": [(-1, 10), (5, 50)],
    "two parts": [(0, 15), (35, 20)],
    "a part twice": [(10, 15), (10, 15)],
    "parts exchanged": [(30, 15), (0, 15)],
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("options", [GOP, OPEN_GOP], ids=["closed", "open"])
def test_edit_lists(name: str, options: dict[str, str], tmp_path: Path) -> None:
    """A clip that was cut without encoding it again: what a player shows, not what is stored."""
    whole = write_numbered(tmp_path / "whole.mp4", options=options)
    file = with_edits(whole, tmp_path / "cut.mp4", EDITS[name])
    assert len(plain_decode(file)) < 60
    check(file, num_starts=4)


def drop(count: int):
    return lambda number, packet: number >= count


def test_files_that_begin_in_the_middle(tmp_path: Path) -> None:
    """Recordings begin anywhere; what comes before the first picture that can be decoded is not shown."""
    closed = write_numbered(tmp_path / "closed.mp4", options=GOP)
    opened = write_numbered(tmp_path / "open.mp4", options=OPEN_GOP)
    hevc = write_numbered(tmp_path / "hevc.mp4", codec="libx265", options=X265_20)
    transport = write_numbered(tmp_path / "whole.ts", options=GOP).read_bytes()
    (tmp_path / "cut.ts").write_bytes(transport[len(transport) // 188 // 4 * 188 :])
    files = [
        remux(closed, tmp_path / "a.mp4", drop(7)),
        remux(closed, tmp_path / "a.mkv", drop(7)),
        remux(opened, tmp_path / "b.mp4", drop(12)),  # begins with pictures that refer to what is gone
        remux(hevc, tmp_path / "c.mkv", drop(7)),
        tmp_path / "cut.ts",
    ]
    for file in files:
        assert len(plain_decode(file)) < 60
        check(file, num_starts=4)


def test_times_that_say_little(tmp_path: Path) -> None:
    """Times that rise unevenly, that two frames share, or that follow the order of decoding."""
    file = write_numbered(tmp_path / "a.mp4", options=GOP)

    def share(number: int, packet: object) -> bool:
        packet.pts -= packet.pts % 1024 if number in (30, 31) else 0  # type: ignore[attr-defined]
        return True

    def as_decoded(number: int, packet: object) -> bool:
        packet.pts = packet.dts = number * 512  # type: ignore[attr-defined]
        return True

    check(write_numbered(tmp_path / "uneven.mkv", options=GOP, times=[i * i + i for i in range(60)]), num_starts=4)
    check(remux(file, tmp_path / "shared.mkv", share), num_starts=4)
    check(remux(file, tmp_path / "decoded.mp4", as_decoded), num_starts=4)


def test_joined_transport_streams(tmp_path: Path) -> None:
    first = write_numbered(tmp_path / "first.ts", options=GOP).read_bytes()
    (tmp_path / "twice.ts").write_bytes(first + first)
    assert check(tmp_path / "twice.ts", num_starts=4).num_frames == 120


def test_parameters_that_change(tmp_path: Path) -> None:
    """Frames of another size, or of pixels of another aspect, are refused where they come."""
    first = write_numbered(tmp_path / "a.ts", options=GOP)
    second = write_numbered(tmp_path / "b.ts", options=GOP, size=(48, 160))
    file = tmp_path / "sizes.ts"
    file.write_bytes(first.read_bytes() + second.read_bytes())
    info = probe(file)
    assert info.num_frames == 120
    assert np.array_equal(frames(file, info, 30, 60, "pyav"), plain_decode(first)[30:])
    with pytest.raises(DataError, match=r"DATA-098: .*sizes\.ts: a frame has another size"):
        frames(file, info, 50, 67, "pyav")
    aspects = [Fraction(16, 27), Fraction(64, 81)]  # 4:3 and 16:9, between which television changes
    parts = [
        write_numbered(tmp_path / "c.ts", codec="mpeg2video", options=GOP, pixel_aspect=aspect).read_bytes()
        for aspect in aspects
    ]
    file.write_bytes(b"".join(parts))
    with pytest.raises(DataError, match=r"DATA-098: .*aspect of its pixels changes"):
        probe(file)


@pytest.mark.parametrize("pixel_format", ["yuva444p10le", "yuv422p10le"])
def test_transparency_is_left_out(pixel_format: str, tmp_path: Path) -> None:
    options = {"profile": "4444"} if "yuva" in pixel_format else {}
    check(write_numbered(tmp_path / "a.mov", 12, "prores_ks", pixel_format, options=options), num_starts=3)


@pytest.mark.parametrize("size", [(33, 161), (34, 146)])
def test_odd_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    check(write_numbered(tmp_path / "a.mkv", 20, "ffv1", "yuv444p", size=size), num_starts=3)
    check(write_numbered(tmp_path / "a.mp4", 40, pixel_format="yuv444p", options=GOP, size=size), num_starts=3)


def test_clips_are_made_from_the_same_frames(tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.ts", options=GOP)
    given = load_video(file, 23, 9, 64, 144)
    assert torch.equal(given, torch.from_numpy(plain_decode(file)[23:32].copy()).permute(3, 0, 1, 2) / 127.5 - 1)


@pytest.mark.parametrize(
    "name",
    ["a.mp4", "fragments.mp4", "a.mov", "a.mkv", "a.webm", "a.flv", "a.wmv", "xvid.avi", "a.avi"],
)
def test_files_that_are_cut_off(name: str, tmp_path: Path) -> None:
    (kind,) = [kind for kind in KINDS if kind.file == name]
    file = kind.write(tmp_path)
    content = file.read_bytes()
    for share in (30, 60, 85):
        (tmp_path / f"cut{file.suffix}").write_bytes(content[: len(content) * share // 100])
        with pytest.raises(DataError) as caught:
            probe(tmp_path / f"cut{file.suffix}")
        assert caught.value.id == "DATA-002", (name, share)


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_a_transport_stream_that_ends_in_a_picture(codec: str, tmp_path: Path) -> None:
    """Nothing announces how long it is; only the last picture tells, which is large here."""
    options = {"qp": "4", "bf": "0"} if codec == "libx264" else {"qmin": "1", "qmax": "1", "b": "50M"}
    size = 256, 320
    content = write_numbered(tmp_path / "a.ts", codec=codec, options={"g": "20", **options}, size=size).read_bytes()
    (tmp_path / "b.ts").write_bytes(content[: len(content) - 188 * 4])
    with pytest.raises(DataError, match=r"DATA-002: .*b\.ts"):
        probe(tmp_path / "b.ts")


def test_bytes_that_are_missing_from_a_transport_stream(tmp_path: Path) -> None:
    content = write_numbered(tmp_path / "a.ts", options={"g": "60"}).read_bytes()
    middle = len(content) // 188 // 2 * 188
    (tmp_path / "b.ts").write_bytes(content[:middle] + content[middle + 6 * 188 :])
    with pytest.raises(DataError, match=r"DATA-002: .*b\.ts"):
        probe(tmp_path / "b.ts")


def test_a_codec_that_no_decoder_knows(tmp_path: Path) -> None:
    content = write_numbered(tmp_path / "a.mp4", 9).read_bytes()
    assert b"avc1" in content
    (tmp_path / "b.mp4").write_bytes(content.replace(b"avc1", b"zzzz"))
    with pytest.raises(DataError, match="DATA-097"):
        probe(tmp_path / "b.mp4")


def test_covers_are_no_videos(tmp_path: Path) -> None:
    """Films and music bring a picture of themselves, which FFmpeg shows as a stream of video."""
    film = write_numbered(tmp_path / "film.mp4", options=GOP)
    covered = with_cover(tmp_path / "covered.mp4", [film])
    with av.open(str(covered)) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic, "the picture comes first"
    plain = plain_decode(film)
    for reader in READERS:
        info = probe(covered, reader)
        assert info.num_frames == 60
        assert np.array_equal(frames(covered, info, 25, 34, reader), plain[25:34])
    song = tmp_path / "song.m4a"
    with av.open(str(song), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="DATA-003"):
        probe(with_cover(tmp_path / "song.mp4", [song]))


def test_what_leads_to_other_files_is_no_video(tmp_path: Path) -> None:
    """FFmpeg follows lists of segments, and patterns in names; text it draws."""
    write_numbered(tmp_path / "segment.ts", options=GOP)
    write_numbered(
        tmp_path / "0001.png", 1, "png", "rgb24", container_format="image2", container_options={"update": "1"}
    )
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.4,\n"
    (tmp_path / "list.m3u8").write_text(f"{head}segment.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile segment.ts\n")
    (tmp_path / "%04d.png").write_bytes((tmp_path / "0001.png").read_bytes())
    (tmp_path / "notes.txt").write_text("no video\n" * 99)
    for name in ("list.m3u8", "list.mp4", "%04d.png", "notes.txt"):
        assert plain_decode(tmp_path / name).size, "FFmpeg would read it"
        with pytest.raises(DataError, match=f"DATA-099: .*{name}"):
            probe(tmp_path / name)


def test_names_that_look_like_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("12:30").mkdir()
    file = write_numbered(tmp_path / "12:30" / "a.mp4", 20, options=GOP)
    for name in ("2024-01-01T12:30:05.mp4", "concat:a.mp4", "http:a.mp4", "%d.mp4"):
        Path(name).write_bytes(file.read_bytes())
    for name in ("12:30/a.mp4", "2024-01-01T12:30:05.mp4", "concat:a.mp4", "http:a.mp4", "%d.mp4"):
        for reader in READERS:
            info = probe(Path(name), reader)
            assert info.read_by == reader
            assert [number_of(frame) for frame in frames(Path(name), info, 3, 8, reader)] == [3, 4, 5, 6, 7]
