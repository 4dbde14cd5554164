"""Headers of coded pictures, beside what FFmpeg decodes of the same packets."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_clips import GOP, OPEN_GOP, REFRESH, X265_20, plain_decode, remux, write_numbered

from mm.data.bitstream import Picture, picture_reader
from mm.data.packets import order_of, read_packets
from mm.data.video import probe, read_frames


def pictures(file: Path) -> tuple[list[Picture | None], list[bool]]:
    """Of each packet of a file; and whether the container calls it a key frame."""
    with av.open(str(file)) as container:
        context = container.streams.video[0].codec_context
        read = picture_reader(context.codec.canonical_name, bytes(context.extradata or b""))
        packets = [(bytes(packet), packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
    return [read(packet) if read else None for packet, _ in packets], [is_key for _, is_key in packets]


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize(
    ("codec", "pixel_format", "options"),
    [
        ("libx264", "yuv420p", GOP),
        ("libx264", "yuv444p", {"x264-params": "keyint=20:cqm=jvt"}),  # twelve scaling lists
        ("libx264", "yuv420p", {"x264-params": "keyint=20:cqm=jvt:slices=4"}),
        ("libx265", "yuv420p", {"x265-params": "log-level=error:keyint=20:open-gop=0:slices=2"}),
    ],
)
def test_closed_key_frames_are_starts(
    suffix: str, codec: str, pixel_format: str, options: dict[str, str], tmp_path: Path
) -> None:
    found, keys = pictures(write_numbered(tmp_path / f"a.{suffix}", 60, codec, pixel_format, options=options))
    assert [picture is not None and picture.is_start for picture in found] == keys
    assert sum(keys) == 3 and all(picture is not None and picture.is_shown for picture in found)


@pytest.mark.parametrize("options", [OPEN_GOP, REFRESH])
def test_key_frames_of_h264_that_are_not_closed_are_no_starts(options: dict[str, str], tmp_path: Path) -> None:
    found, keys = pictures(write_numbered(tmp_path / "a.mp4", options=options))
    assert sum(keys) >= 4
    assert [picture for picture in found if picture is None or picture.is_start] == [Picture(is_start=True)]


def test_fields_are_not_understood(tmp_path: Path) -> None:
    found, _ = pictures(write_numbered(tmp_path / "a.mp4", options={"x264-params": "tff=1:keyint=20"}))
    assert set(found) == {None}


def test_leading_pictures_of_h265(tmp_path: Path) -> None:
    """Each is shown before the start that it follows, and there are some."""
    file = write_numbered(tmp_path / "a.mp4", codec="libx265", options=X265_20)
    found, _ = pictures(file)
    with av.open(str(file)) as container:
        times = [packet.pts for packet in container.demux(video=0) if packet.size]
    leading = [number for number, picture in enumerate(found) if picture is not None and picture.is_leading]
    assert leading
    for number, picture in enumerate(found):
        if picture is not None and not picture.is_start:
            start = max(at for at in range(number) if (p := found[at]) is not None and p.is_start)
            assert (times[number] < times[start]) == picture.is_leading


def test_vp8_packets_that_show_nothing(tmp_path: Path) -> None:
    """Every third packet but those of key frames, by its show_frame bit (RFC 6386, 9.1); they stay references."""

    def hide(number: int, packet: av.Packet) -> bool:
        if number % 3 == 1 and not packet.is_keyframe:
            packet.update(bytes([bytes(packet)[0] & ~0x10]) + bytes(packet)[1:])
        return True

    file = remux(write_numbered(tmp_path / "a.webm", codec="libvpx", options=GOP), tmp_path / "b.webm", hide)
    found, keys = pictures(file)
    assert [picture is not None and picture.is_start for picture in found] == keys
    plain = plain_decode(file)
    assert 35 < sum(picture is not None and picture.is_shown for picture in found) == len(plain) < len(found)
    info = probe(file)
    frames = torch.cat(list(read_frames(file, info, range(20, 39)))).permute(0, 2, 3, 1)
    assert info.order is not None and np.array_equal(frames.numpy(), plain[20:39])


def test_packets_that_show_one_picture_and_hide_another(tmp_path: Path) -> None:
    vp9 = {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5", "b": "60k"}
    av1 = {"g": "20", "preset": "10"}
    policy = os.sched_getscheduler(0)
    for codec, options in (("libvpx-vp9", vp9), ("libsvtav1", av1)):
        found, keys = pictures(write_numbered(tmp_path / "a.mkv", codec=codec, options=options))
        assert [picture is not None and picture.is_start for picture in found] == keys
        assert all(picture is not None and picture.is_shown for picture in found) and len(found) == 60
        assert os.sched_getscheduler(0) == policy  # which the AV1 encoder changes for all that comes later


def test_a_packet_that_is_cut_off_is_not_understood(tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.mp4", options=GOP)
    with av.open(str(file)) as container:
        context = container.streams.video[0].codec_context
        extradata = bytes(context.extradata)
        packet = bytes(next(container.demux(video=0)))
    read = picture_reader("h264", extradata)
    assert read is not None and read(packet) == Picture(is_start=True)
    assert [read(packet[:-1]), read(packet + packet), read(b""), read(bytes(9))] == [None] * 4
    assert picture_reader("h264", extradata[:12]) is None and picture_reader("h264", b"") is None
    assert picture_reader("theora", extradata) is None


def test_no_order_where_something_is_uncertain(tmp_path: Path) -> None:
    with av.open(str(write_numbered(tmp_path / "a.mp4", options=GOP))) as container:
        stream = container.streams.video[0]
        packets = read_packets(container, stream)
        unit, depth = stream.time_base, stream.codec_context.reorder_depth
    certain = order_of(packets, unit, depth)
    assert certain is not None
    assert [frame for frame, _ in certain.starts] == [0, 20, 40] == [packet for _, packet in certain.starts]
    assert certain.start_before(19) == (0, 0) and certain.start_before(20) == (20, 20)
    assert order_of(packets, unit, depth - 1) is None  # the decoder would drop pictures
    assert order_of(packets[1:], unit, depth) is None
    assert order_of([packet._replace(time=packet.time or None) for packet in packets], unit, depth) is None
    for number, time in ((7, packets[8].time), (25, packets[3].time)):  # shared; of another group of pictures
        changed = list(packets)
        changed[number] = changed[number]._replace(time=time if number == 7 else (time or 0) + 1)
        assert order_of(changed, unit, depth + 30) is None
    assert order_of([], unit, depth) is None
