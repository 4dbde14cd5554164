"""Pictures as they are meant to be shown: turned, mirrored, and with pixels that are not square."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numbered_clips import draw, plain_decode, with_matrix, write_numbered
from PIL import Image, ImageOps

from mm.config.run.extraction import SourceClip
from mm.data.clips import load_clip
from mm.data.metadata import Annotation, Resolution, VideoSample
from mm.data.transforms import resize_and_crop
from mm.data.video import Reader, probe, read_frames
from mm.errors import DataError

READERS: tuple[Reader, ...] = ("pyav", "decord")
HEIGHT, WIDTH = 64, 144


def shown(file: Path, reader: Reader = "pyav") -> np.ndarray:
    if reader == "decord":
        pytest.importorskip("decord")
    info = probe(file, reader)
    frames = torch.cat(list(read_frames(file, info, range(info.num_frames), reader)))
    assert frames.shape[2:] == (info.height, info.width)
    return frames.permute(0, 2, 3, 1).numpy()


MATRICES = {
    "as stored": (1, 0, 0, 1),
    "quarter turn": (0, 1, -1, 0),
    "half turn": (-1, 0, 0, -1),
    "three quarters": (0, -1, 1, 0),
    "left and right mirrored": (-1, 0, 0, 1),
    "top and bottom mirrored": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed the other way": (0, -1, -1, 0),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_matrix_is_obeyed(matrix: tuple[int, ...], reader: Reader, tmp_path: Path) -> None:
    """A track's matrix maps (x, y) to (a x + c y + tx, b x + d y + ty), ISO/IEC 14496-12, 8.3.2, here by centres."""
    stored_file = write_numbered(tmp_path / "stored.mp4", 3)
    stored = plain_decode(stored_file)
    found = shown(with_matrix(stored_file, tmp_path / "a.mp4", matrix), reader)
    a, b, c, d = matrix
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    column, row = a * x + c * y, b * x + d * y
    assert np.array_equal(found[:, row - row.min(), column - column.min()], stored[:, y, x])


@pytest.mark.parametrize("matrix", [(0.7071, 0.7071, -0.7071, 0.7071), (1, 0.1, 0, 1), (0, 0, 0, 0), (1, 0, 0, 0)])
def test_other_matrices_are_refused(matrix: tuple[float, ...], tmp_path: Path) -> None:
    file = with_matrix(write_numbered(tmp_path / "stored.mp4", 3), tmp_path / "a.mp4", matrix)
    with pytest.raises(DataError, match=r"DATA-096: .*a\.mp4 is to be shown with the display matrix"):
        probe(file)


def test_scale_of_a_matrix_is_the_aspect_of_pixels(tmp_path: Path) -> None:
    """Twice as wide, and turned by a quarter."""
    stored = write_numbered(tmp_path / "stored.mp4", 3)
    assert probe(with_matrix(stored, tmp_path / "a.mp4", (2, 0, 0, 2))).shown_size == (HEIGHT, WIDTH)
    assert probe(with_matrix(stored, tmp_path / "b.mp4", (2, 0, 0, 1))).shown_size == (HEIGHT, 2 * WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_that_a_camera_noted_in_each_picture(orientation: int, tmp_path: Path) -> None:
    """Motion JPEG with EXIF, beside what Pillow makes of the same pixels."""
    tags = Image.Exif()
    tags[0x0112] = orientation
    coded = io.BytesIO()
    Image.fromarray(draw(5)).save(coded, "jpeg", exif=tags, quality=95)
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        for number in range(3):
            packet = av.Packet(coded.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    stored = Image.fromarray(plain_decode(file)[2])
    stored.getexif()[0x0112] = orientation
    assert np.array_equal(shown(file)[2], np.asarray(ImageOps.exif_transpose(stored)))


ASPECTS = [Fraction(16, 11), Fraction(4, 3), Fraction(8, 9), Fraction(1, 2)]


@pytest.mark.parametrize("aspect", ASPECTS)
def test_pixels_that_are_not_square(aspect: Fraction, tmp_path: Path) -> None:
    """A clip is what Pillow makes of the picture in the shape that players give it: nothing is squeezed."""
    file = write_numbered(tmp_path / "a.mp4", 9, pixel_aspect=aspect)
    info = probe(file)
    assert (info.height, info.width, info.pixel_aspect) == (HEIGHT, WIDTH, aspect)
    assert info.shown_size == (HEIGHT, round(WIDTH * aspect))
    sample = VideoSample("a", file, ("x",), Annotation(path="a.mp4", cap="x"))
    clip = load_clip(sample, SourceClip(num_frames=9, height=32, width=48), seed=0).pixels
    scale = max(32 / HEIGHT, 48 / (WIDTH * aspect))
    height, width = round(HEIGHT * scale), round(float(WIDTH * aspect * scale))
    image = Image.fromarray(plain_decode(file)[4]).resize((width, height), Image.Resampling.BILINEAR)
    top, left = (height - 32) // 2, (width - 48) // 2
    expected = np.asarray(image.crop((left, top, left + 48, top + 32))) / 127.5 - 1
    assert np.abs(clip[:, 4].permute(1, 2, 0).numpy() - expected).max() <= 1.01 / 127.5  # Pillow rounds twice


def test_a_turned_picture_of_pixels_that_are_not_square(tmp_path: Path) -> None:
    stored = write_numbered(tmp_path / "stored.mp4", 3, pixel_aspect=Fraction(2))
    info = probe(with_matrix(stored, tmp_path / "a.mp4", MATRICES["quarter turn"]))
    assert (info.height, info.width, info.pixel_aspect) == (WIDTH, HEIGHT, Fraction(1, 2))
    frames = torch.zeros(1, 3, info.height, info.width, dtype=torch.uint8)
    frames[..., info.height // 2 :, :] = 255  # covering 32 x 32 of 144 x 32 shown: half of it is light, still
    assert resize_and_crop(frames, 32, 32, info.pixel_aspect).mean().abs() < 1e-3


@pytest.mark.parametrize(("size", "agrees"), [((64, 144), True), ((64, 192), True), ((64, 108), False)])
def test_annotated_size_is_the_stored_or_the_shown_one(size: tuple[int, int], agrees: bool, tmp_path: Path) -> None:
    file = write_numbered(tmp_path / "a.mp4", 9, pixel_aspect=Fraction(4, 3))
    resolution = Resolution(height=size[0], width=size[1])
    sample = VideoSample("a", file, ("x",), Annotation(path="a.mp4", cap="x", resolution=resolution))
    rule = SourceClip(num_frames=9, height=32, width=48)
    if agrees:
        assert load_clip(sample, rule, seed=0).num_frames == 9
    else:
        with pytest.raises(DataError, match=r"DATA-005.*height 64, width 144, shown as 64 x 192"):
            load_clip(sample, rule, seed=0)


def test_aspects_that_make_no_sense(tmp_path: Path) -> None:
    stored = write_numbered(tmp_path / "stored.mp4", 3)
    with pytest.raises(DataError, match="DATA-006"):
        probe(with_matrix(stored, tmp_path / "a.mp4", (200, 0, 0, 1)))
