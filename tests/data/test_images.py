"""Images as samples: one frame, sizes without decoding, and files that are none."""

import io
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mm.config.run.extraction import SourceClip
from mm.data.clips import CheckClip, load_clip
from mm.data.image import probe_image, read_image
from mm.data.metadata import Annotation, VideoSample
from mm.data.transforms import resize_and_crop
from mm.errors import DataError

HEIGHT, WIDTH = 24, 40
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
CLIP = SourceClip(num_frames=81, height=16, width=32)


def save(file: Path, image: Image.Image | None = None, **options: Any) -> Path:
    (image or Image.fromarray(PIXELS)).save(file, **options)
    return file


def sample(file: Path, **annotation: Any) -> VideoSample:
    return VideoSample(file.name, file, ("x",), Annotation(path=file.name, cap="x", **annotation), kind="image")


def test_a_clip_of_one_frame(tmp_path: Path) -> None:
    clip = load_clip(sample(save(tmp_path / "x.png")), CLIP, seed=1)
    assert clip.pixels.shape == (3, 1, 16, 32) and (clip.start, clip.num_frames) == (0, 1)
    expected = resize_and_crop(torch.from_numpy(PIXELS.copy()).permute(2, 0, 1)[None], 16, 32)[0]
    assert torch.equal(clip.pixels[:, 0], expected)


def test_it_is_the_frame_that_a_video_of_it_gives(tmp_path: Path) -> None:
    """A lossless video of the same pixels, read by PyAV, cropped and scaled."""
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(PIXELS)))
        container.mux(stream.encode())
    video = VideoSample("x", tmp_path / "x.mkv", ("x",), Annotation(path="x.mkv", cap="x"))
    one_frame = SourceClip(num_frames=1, height=16, width=32)
    image = load_clip(sample(save(tmp_path / "x.png")), CLIP, seed=1)
    assert torch.equal(load_clip(video, one_frame, seed=1).pixels, image.pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_sizes_are_told_upright_without_decoding(orientation: int, ending: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    more: dict[str, Any] = {"tiffinfo": {274: orientation}} if ending == "tif" else {"exif": exif}
    file = save(tmp_path / f"x.{ending}", **more)
    height, width = (WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH)
    assert probe_image(file) == tuple(read_image(file).shape[:2]) == (height, width)


@pytest.mark.parametrize("pixel_format", ["rgb48be", "rgba64be"])
def test_16_bits_a_colour(pixel_format: str, tmp_path: Path) -> None:
    """Against FFmpeg's encoder and decoder; one of the two rounds, and the other cuts off."""
    wide = PIXELS.astype(np.uint16) * 257
    if pixel_format == "rgba64be":
        wide = np.dstack([wide, np.full((HEIGHT, WIDTH), 9000, np.uint16)])
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = WIDTH, HEIGHT, pixel_format, 1
    frame = av.VideoFrame(WIDTH, HEIGHT, pixel_format)
    plane = np.zeros((HEIGHT, frame.planes[0].line_size // 2), ">u2")
    plane[:, : WIDTH * wide.shape[2]] = wide.reshape(HEIGHT, -1)
    frame.planes[0].update(plane.tobytes())
    (tmp_path / "x.png").write_bytes(b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)]))
    assert np.abs(read_image(tmp_path / "x.png").numpy().astype(int) - PIXELS).max() <= 1


def test_transparency_is_left_out(tmp_path: Path) -> None:
    """The colour that is stored, wholly transparent or not."""
    alpha = np.tile(np.arange(WIDTH, dtype=np.uint8) * 6, (HEIGHT, 1))
    for name in ("x.png", "y.webp"):
        file = save(tmp_path / name, Image.fromarray(np.dstack([PIXELS, alpha])), lossless=True, exact=True)
        assert np.array_equal(read_image(file).numpy(), PIXELS)


def test_a_colour_profile_is_not_applied(tmp_path: Path) -> None:
    """As FFmpeg, which is asked here, leaves it."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    file = save(tmp_path / "x.png", icc_profile=profile)
    with av.open(str(file)) as container:
        decoded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(read_image(file).numpy(), decoded) and np.array_equal(decoded, PIXELS)


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif"])
def test_several_pictures_are_refused(name: str, tmp_path: Path) -> None:
    images = [Image.fromarray(np.roll(PIXELS, shift, 1)) for shift in range(3)]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:])
    for read in (read_image, probe_image):
        with pytest.raises(DataError, match="holds 3 pictures") as caught:
            read(tmp_path / name)
        assert caught.value.id == "DATA-175"
    assert read_image(tmp_path / name, may_have_several=True).shape == (HEIGHT, WIDTH, 3)


def test_the_first_picture_of_a_camera_s_mpo(tmp_path: Path) -> None:
    """A JPEG with further views behind it, as phones write."""
    file = save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert Image.open(file).n_frames == 2
    assert read_image(file).shape == (HEIGHT, WIDTH, 3) and probe_image(file) == (HEIGHT, WIDTH)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that announces a size, and has one pixel."""
    text = io.BytesIO()
    Image.new("L", (1, 1)).save(text, "PNG")
    content = bytearray(text.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    "content", [b"", b"no image", png_header(20000, 10), png_header(16000, 16000), png_header(0, 4)]
)
def test_files_that_are_no_image(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for read in (read_image, probe_image):
        with pytest.raises(DataError) as caught:
            read(tmp_path / "x.png")
        assert caught.value.id == "DATA-086"


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tif"])
def test_images_that_are_cut_off(ending: str, tmp_path: Path) -> None:
    file = save(tmp_path / f"x.{ending}")
    content = file.read_bytes()
    for size in range(8, len(content) - len(content) // 8, len(content) // 16):
        file.write_bytes(content[:size])
        with pytest.raises(DataError) as caught:
            read_image(file)
        assert caught.value.id == "DATA-086"


@pytest.mark.parametrize("quick", [True, False])
def test_an_image_that_is_not_what_its_row_says(quick: bool, tmp_path: Path) -> None:
    file = save(tmp_path / "x.png")
    right = {"num_frames": 1, "resolution": {"height": HEIGHT, "width": WIDTH}}
    check = CheckClip(CLIP, 1, quick)
    assert check(sample(file, **right)).facts == {"read_by": "pillow"}
    with pytest.raises(DataError) as caught:
        check(sample(file, num_frames=9, resolution={"height": WIDTH, "width": HEIGHT}))
    assert [problem.id for problem in caught.value.problems] == ["DATA-005", "DATA-005"]
    assert "the image has 1 frames" in str(caught.value)
