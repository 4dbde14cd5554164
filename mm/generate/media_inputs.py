"""The images and videos that clips are made from, as pixels: resized and cropped as training does with its clips."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm.data.image import image_pixels, probe_image, read_image
from mm.data.transforms import resize_and_crop
from mm.data.video import probe, read_frames
from mm.errors import ConfigError, DataError

_MOST_COLOUR = 0.25
"""What lossy codecs leave of grey is less."""


def load_image(path: Path, height: int, width: int) -> Tensor:
    """An image as a frame, float32 [3, height, width] in [-1, 1]; of an animation its first picture.

    Raises:
        DataError: what `mm.data.image.read_image` raises.
    """
    return pixels_frame(read_image(path, may_have_several=True), height, width)


def image_frame(image: Image.Image, name: str, height: int, width: int) -> Tensor:
    """An open image as `load_image` gives its file; `name` is what to call it. Raises DATA-110 as that does."""
    return pixels_frame(image_pixels(image, name), height, width)


def pixels_frame(pixels: Tensor, height: int, width: int) -> Tensor:
    """An image's pixels, uint8 [H, W, 3], as `load_image` gives its file."""
    return resize_and_crop(pixels.permute(2, 0, 1).unsqueeze(0), height, width)[0]


def load_picture(path: Path) -> Tensor:
    """An image of its own size, float32 [3, any height, any width] in [-1, 1]; raises as `load_image`."""
    return picture(read_image(path, may_have_several=True))


def picture(pixels: Tensor) -> Tensor:
    """An image's pixels, uint8 [H, W, 3], as `load_picture` gives its file."""
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def load_mask(path: Path, of_video: Path | None, start: int, size: tuple[int, int, int]) -> Tensor:
    """A mask, float32 [frames, height, width] from 0 (black) to 1 (white), resized and cropped as the clip's video.

    Args:
        path: a video, whose frames are those of the clip's video, or an image, which is for all frames.
        of_video: the clip's video. start: the first frame that is taken of both. size: of the clip.

    Raises:
        ConfigError: CFG-252 for a mask of another size than the video, CFG-281 for one in colours.
        DataError: what `load_image` and `load_video` raise.
    """
    frames, height, width = size
    is_image = _is_image(path)
    if of_video is not None:
        found, wanted = probe_image(path) if is_image else probe(path).shown_size, probe(of_video).shown_size
        if found != wanted:
            (tall, wide), (rows, columns) = found, wanted
            message = f"The mask {path} is {tall}x{wide} pixels, its video {of_video} {rows}x{columns}."
            raise ConfigError("CFG-252", message, "Give a mask of the video's size.")
    if is_image:
        return as_mask(load_image(path, height, width)[:, None], str(path)).repeat(frames, 1, 1)
    return as_mask(load_video(path, start, *size), str(path))


def as_mask(pixels: Tensor, name: str) -> Tensor:
    """Pixels [3, F, height, width] in [-1, 1] as a mask, [F, height, width] from 0 to 1; CFG-281 for colours."""
    spread = float((pixels.amax(0) - pixels.amin(0)).max()) / 2
    if spread > _MOST_COLOUR:
        message = f"The mask {name} has colours: red, green and blue of a pixel differ by {spread:.0%}."
        raise ConfigError("CFG-281", message, "Give a grey one: white where the clip is to be made anew, else black.")
    return ((pixels.mean(0) + 1) / 2).clamp(0, 1)


def _is_image(path: Path) -> bool:
    """Tell images from videos by their content."""
    try:
        probe_image(path)
    except DataError as error:
        if {problem.id for problem in error.problems} & {"DATA-086", "DATA-175"}:  # none, or an animation
            return False
        raise
    return True


def load_video(path: Path, start: int, num_frames: int, height: int, width: int) -> Tensor:
    """Consecutive frames of a video, float32 [3, num_frames, height, width] in [-1, 1].

    Raises:
        DataError: what `mm.data.video` raises, DATA-087 when the video is too short.
    """
    info = probe(path)
    if info.num_frames < start + num_frames:
        raise DataError(
            "DATA-087",
            f"{path} has {info.num_frames} frames, and frames {start} to {start + num_frames - 1} are asked for.",
            "Use a longer video, or lower start_frame or the frames of input_size.",
        )
    chunks = read_frames(path, info, range(start, start + num_frames))
    frames = torch.cat([resize_and_crop(chunk, height, width, info.pixel_aspect) for chunk in chunks])
    return frames.transpose(0, 1).contiguous()
