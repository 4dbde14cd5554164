"""Images of every kind of pixel, against numpy's arithmetic on what was written and against FFmpeg's decoder."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mm.errors import DataError
from mm.generate.media_inputs import load_image

HEIGHT, WIDTH = 16, 32
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)  # black to white
COLOURS = np.stack([RAMP, RAMP[::-1], np.roll(RAMP, 7, 1)], -1)
BYTES = np.rint(COLOURS * 255).astype(np.uint8)
ALPHA = np.rint(RAMP.T.reshape(HEIGHT, WIDTH) * 255).astype(np.uint8)


def levels(path: Path) -> np.ndarray:
    """What is read, as 0..255 [H, W, 3]; nothing is resized at the image's own size."""
    return (load_image(path, HEIGHT, WIDTH).permute(1, 2, 0).numpy() + 1) * 127.5


def by_ffmpeg(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def grey(most: float, kind: type) -> np.ndarray:
    return (RAMP * most).astype(kind)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("16 bits.png", Image.fromarray(grey(65535, np.uint16))),
        ("16 bits.tif", Image.fromarray(grey(65535, np.uint16))),
        ("big-endian.tif", Image.frombytes("I;16B", (WIDTH, HEIGHT), grey(65535, np.uint16).astype(">u2").tobytes())),
        ("16 bits.pgm", Image.fromarray(grey(65535, np.uint16))),
        ("32 bits, to 65535.tif", Image.fromarray(grey(65535, np.int32))),
        ("32 bits, to 255.tif", Image.fromarray(grey(255, np.int32))),
        ("fractions.tif", Image.fromarray(grey(1, np.float32))),
        ("floats to 255.tif", Image.fromarray(grey(255, np.float32))),
        ("floats to 65535.tif", Image.fromarray(grey(65535, np.float32))),
        ("fractions.pfm", Image.fromarray(grey(1, np.float32))),
        ("8 bits.png", Image.fromarray(np.rint(RAMP * 255).astype(np.uint8))),
    ],
)
def test_grey_images_go_from_black_to_white(name: str, image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / name)
    expected = np.repeat(RAMP[..., None] * 255, 3, axis=2)
    assert np.abs(levels(tmp_path / name) - expected).max() < 1.01  # one level: whole numbers below 255 were cut off


def test_a_dim_image_of_16_bits_stays_dim(tmp_path: Path) -> None:
    Image.fromarray(grey(6553.5, np.uint16)).save(tmp_path / "dim.png")
    assert np.abs(levels(tmp_path / "dim.png")[..., 0] - RAMP * 25.5).max() <= 0.51
    assert np.abs(levels(tmp_path / "dim.png") - by_ffmpeg(tmp_path / "dim.png")).max() <= 1.01


def test_tiff_of_which_white_is_zero(tmp_path: Path) -> None:
    Image.fromarray(grey(65535, np.uint16)).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert np.abs(levels(tmp_path / "x.tif")[..., 0] - (1 - RAMP) * 255).max() < 1.01


@pytest.mark.parametrize(
    ("name", "image", "exact"),
    [
        ("rgb.png", Image.fromarray(BYTES), True),
        ("rgba.png", Image.fromarray(np.dstack([BYTES, ALPHA]), "RGBA"), True),
        ("la.png", Image.merge("LA", [Image.fromarray(BYTES[..., 0]), Image.fromarray(ALPHA)]), True),
        ("1.png", Image.fromarray(BYTES[..., 0] > 100), True),
        ("p.png", Image.fromarray(BYTES).quantize(17), True),
        ("cmyk.jpg", Image.fromarray(np.dstack([BYTES, ALPHA]), "CMYK"), False),
        ("ycbcr.jpg", Image.fromarray(BYTES).convert("YCbCr"), False),
    ],
)
def test_colour_images_are_what_ffmpeg_decodes(name: str, image: Image.Image, exact: bool, tmp_path: Path) -> None:
    image.save(tmp_path / name, **({} if exact else {"quality": 100, "subsampling": 0}))
    difference = np.abs(levels(tmp_path / name) - by_ffmpeg(tmp_path / name))
    assert difference.max() < (0.01 if exact else 6) and difference.mean() < 1


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 255, 15))])
def test_a_palette_with_transparency_keeps_its_colours(transparency: object, tmp_path: Path) -> None:
    image = Image.fromarray(BYTES).quantize(17)
    image.save(tmp_path / "p.png", transparency=transparency)
    palette = np.array(image.getpalette()).reshape(-1, 3)
    assert np.abs(levels(tmp_path / "p.png") - palette[np.asarray(image)]).max() < 0.01


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sixteen", [False, True])
def test_orientation(orientation: int, sixteen: bool, tmp_path: Path) -> None:
    """As EXIF 2.3 defines it: 6 is turned clockwise to be seen upright, 2 mirrored, and so on."""
    size = 24
    pixels = (np.arange(size * size).reshape(size, size) * (65535 // (size * size - 1))).astype(np.uint16)
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1],
        5: pixels.T, 6: np.rot90(pixels), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored if sixteen else (stored // 257).astype(np.uint8)))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "x.png", exif=exif)
    found = (load_image(tmp_path / "x.png", size, size)[0].numpy() + 1) * 127.5
    assert np.abs(found - pixels / 257).max() < 1.01


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_orientation_of_tiff(orientation: int, compression: str | None, kind: type, tmp_path: Path) -> None:
    """Pictures that are not square, with TIFF's own tag."""
    upright = grey(np.iinfo(kind).max, kind)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.save(tmp_path / "x.tif", tiffinfo={274: orientation}, compression=compression)
    assert np.abs(levels(tmp_path / "x.tif")[..., 0] - RAMP * 255).max() < 1.01


def test_postscript_is_not_run(tmp_path: Path) -> None:
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_text(text)
    with pytest.raises(DataError, match=r"DATA-086: .*x\.png is PostScript"):
        load_image(tmp_path / "x.png", 4, 4)


OVERSHOT = np.linspace(0, 1.02, 16).reshape(4, 4)  # as sharpening leaves it


@pytest.mark.parametrize(
    "values", [OVERSHOT, np.full((4, 4), -1.0), np.full((4, 4), 1e9), np.array([[0, np.nan], [1, 2]])]
)
def test_numbers_without_a_known_range_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="DATA-110"):
        load_image(tmp_path / "x.tif", 4, 4)


def test_it_is_a_frame(tmp_path: Path) -> None:
    Image.fromarray(grey(65535, np.uint16)).save(tmp_path / "x.png")
    frame = load_image(tmp_path / "x.png", 8, 8)
    assert frame.shape == (3, 8, 8) and frame.dtype == torch.float32 and -1 <= frame.min() < frame.max() <= 1
