import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from feature_samples import moving_square, write_clip, write_sound
from torch import Tensor

from mm.data.video import CHUNK_FRAMES, Reader, probe, read_frames
from mm.errors import DataError

READERS: tuple[Reader, ...] = ("pyav", "decord")


def read(file: Path, indices: list[int] | range, reader: Reader) -> Tensor:
    if reader == "decord":
        pytest.importorskip("decord")
    return torch.cat(list(read_frames(file, probe(file, reader), indices, reader)))


def decoded_by_ffmpeg(file: Path) -> np.ndarray:
    """Every frame in order, decoded from the start without any seeking: uint8 [F, H, W, 3]."""
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def expect(file: Path, id: str) -> str:
    with pytest.raises(DataError) as caught:
        info = probe(file)
        list(read_frames(file, info, range(info.num_frames), "pyav"))
    assert caught.value.id == id
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("indices", [range(40), range(13, 30, 3), [0], [39], [2, 3, 17, 38]])
def test_frames_are_those_of_a_plain_decode(reader: Reader, indices: range, tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", num_frames=40, gop=12)
    frames = read(file, indices, reader)
    assert frames.dtype == torch.uint8
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), decoded_by_ffmpeg(file)[list(indices)])


def test_content_is_right_way_up_and_in_order(tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", num_frames=9)
    frames = read(file, range(9), "pyav").permute(0, 2, 3, 1).numpy().astype(int)
    drawn = moving_square(9, 48, 64).astype(int)
    assert np.abs(frames - drawn).mean() < 12  # lossy coding and chroma subsampling
    closest = [int(np.abs(drawn - frame).mean(axis=(1, 2, 3)).argmin()) for frame in frames]
    assert closest == list(range(9))


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv444p", "yuv422p", "yuv420p10le"])
@pytest.mark.parametrize(("height", "width"), [(48, 64), (50, 34)])
def test_both_readers_agree_on_every_format(pixel_format: str, height: int, width: int, tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", 12, height, width, pixel_format)
    assert torch.equal(read(file, range(1, 12), "pyav"), read(file, range(1, 12), "decord"))


@pytest.mark.parametrize("width", [8, 12, 16, 24, 48, 72])
def test_widths_that_decord_cannot_read(width: int, tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", 9, 32, width)
    assert np.array_equal(read(file, range(9), "decord").permute(0, 2, 3, 1).numpy(), decoded_by_ffmpeg(file))


def test_both_readers_agree_on_real_clips(real_clips: Path) -> None:
    files = sorted((real_clips / "videos").glob("*.mp4"))
    assert files
    for file in files:
        num_frames = probe(file).num_frames
        assert probe(file, "decord").read_by == "decord"
        indices = range(num_frames // 3, num_frames, 9)
        assert torch.equal(read(file, indices, "pyav"), read(file, indices, "decord")), file


def test_frames_come_in_small_pieces(tmp_path: Path) -> None:
    file = write_clip(tmp_path / "a.mp4", num_frames=20)
    for reader in READERS:
        if reader == "decord":
            pytest.importorskip("decord")
        sizes = [len(chunk) for chunk in read_frames(file, probe(file, reader), range(20), reader)]
        assert max(sizes) == CHUNK_FRAMES and sum(sizes) == 20


def test_variable_frame_rate_is_read_by_frame(tmp_path: Path) -> None:
    file = tmp_path / "vfr.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for index, pixels in enumerate(moving_square(12, 32, 32)):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts = index * index + index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(file).num_frames == 12
    assert np.array_equal(read(file, range(3, 12), "pyav").permute(0, 2, 3, 1).numpy(), decoded_by_ffmpeg(file)[3:])
    assert torch.equal(read(file, range(3, 12), "pyav"), read(file, range(3, 12), "decord"))


def test_damaged_files(tmp_path: Path) -> None:
    good = write_clip(tmp_path / "good.mp4", num_frames=40, gop=12).read_bytes()
    streamable = write_clip(tmp_path / "streamable.mp4", num_frames=40, faststart=True).read_bytes()
    assert streamable.find(b"moov") < streamable.find(b"mdat")

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    expect(file("zero.mp4", b""), "DATA-002")
    expect(file("text.mp4", b"this is not a video " * 50), "DATA-002")
    expect(file("no-index.mp4", good[: len(good) // 2]), "DATA-002")
    assert "of 40 frames" in expect(file("cut-off.mp4", streamable[: len(streamable) * 2 // 3]), "DATA-002")
    middle = len(good) // 3
    expect(file("scratched.mp4", good[:middle] + bytes(300) + good[middle + 300 :]), "DATA-002")


def test_damage_that_stops_decord(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    content = bytearray(write_clip(tmp_path / "bad.mp4", num_frames=40, gop=12).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 600] = b"\xff" * 600
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(DataError, match=r"DATA-002.*bad\.mp4"):
        read(tmp_path / "bad.mp4", range(40), "decord")


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    expect(tmp_path / "missing.mp4", "DATA-001")
    expect(tmp_path, "DATA-001")
    os.mkfifo(tmp_path / "fifo.mp4")
    expect(tmp_path / "fifo.mp4", "DATA-001")
    expect(write_sound(tmp_path / "audio.mp4"), "DATA-003")


def test_size_of_a_hostile_header_is_refused(tmp_path: Path) -> None:
    """An uncompressed AVI whose stream header claims 40000 x 40000 pixels."""
    file = tmp_path / "huge.avi"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("rawvideo", rate=8)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(moving_square(1, 16, 16)[0])))
        container.mux(stream.encode())
    content = bytearray(file.read_bytes())
    place = content.find(b"strf") + 8
    assert struct.unpack_from("<3i", content, place)[:2] == (40, 16)
    struct.pack_into("<2i", content, place + 4, 40000, 40000)
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        probe(file)
    assert caught.value.id in ("DATA-006", "DATA-002")


def test_decord_asked_for_and_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_clip(tmp_path / "a.mp4")
    info = probe(file)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="DATA-007"):
        list(read_frames(file, info, range(9), "decord"))
    assert len(torch.cat(list(read_frames(file, info, range(9), "auto")))) == 9
