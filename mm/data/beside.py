"""Media beside a clip, read as the clip is: the same frames, resized and cut out alike.

What a row lists no file for is taken from the clip itself where its task says so (`mm.config.tasks.task.Media`). A clip
gives one image at most: its first frame, or, of tasks that take another one as a reference, a frame that is drawn.

Shapes: F frames, H height, W width, those of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from mm.canvas import white_canvas
from mm.config.tasks.task import Media, MediaKind
from mm.data.image import read_image
from mm.data.metadata import Kind, VideoSample
from mm.data.shapes.fixed import fixed_shape
from mm.data.shapes.shape import Shape
from mm.data.sources.cells import kind_of
from mm.data.transforms import to_shape
from mm.data.video import Reader, VideoInfo, probe, read_frames
from mm.drops import draw_reference_frame
from mm.errors import ConfigError, DataError, Problem, raise_all
from mm.poses import NUMBERS_A_ROW, read_poses, rows_of_frames

FIRST_FRAME_SHARE = 0.4
"""Share of clips whose drawn image is the first frame. Source: `control_ref_image` `random` of VideoX-Fun's trainer."""


@dataclass(frozen=True)
class Taken:
    """Part of a video that a clip is.

    Attributes:
        kind: of the file. height, width: of its picture as it is shown. shape: that it was brought to.
        indices: numbers of its frames. of: frames of the whole video.
        reader: as `mm.config.run.extraction.SourceClip.reader`.
    """

    kind: Kind
    height: int
    width: Fraction
    shape: Shape
    indices: Sequence[int]
    of: int
    reader: Reader


def read_beside(
    sample: VideoSample, media: Sequence[Media], pixels: Tensor, taken: Taken, seed: int, draw: int
) -> dict[str, Tensor]:
    """The media of a sample by role; those that neither the row nor the clip gives are left out.

    Args:
        sample: whose. media: that the task takes. pixels: of the clip, [3, F, H, W] in [-1, 1]. taken: how they were.
        seed, draw: of the frame that is drawn.

    Returns:
        Of a video [3, F, H, W], of an image [3, H, W], of R images [R, 3, H, W], in [-1, 1]; of a mask [F, H, W] from 0
        to 1; of a camera's path [F + 1, 19] fp64, its first row the part of the picture.

    Raises:
        DataError: what `mm.data.video` and `mm.data.image` raise; DATA-248 for a video that ends before the clip,
            DATA-249 for one whose picture has another aspect, and DATA-251 for a malformed pose file.
    """
    found = {one.name: _READ[one.kind](sample.roles[one.name], taken) for one in media if sample.roles.get(one.name)}
    images = {one.from_clip: one.name for one in media if one.kind == "image" and one.from_clip is not None}
    if images and not found.keys() & images.values():
        index = drawn_frame(pixels.shape[1], sample.id, seed, draw) if "other frame" in images else 0
        found[images["other frame" if index else "first frame"]] = pixels[:, index]
    return found


def drawn_frame(num_frames: int, sample: str, seed: int, draw: int) -> int:
    """Index of the frame of a clip that is its image: the first for `FIRST_FRAME_SHARE`, else any other."""
    return draw_reference_frame(num_frames, FIRST_FRAME_SHARE, seed, sample, draw)


def numbers_of(one: Media, pixels: int, of_frame: int) -> int:
    """Numbers that a role's tensor has at most beside a clip of so many pixels in all frames, and in one of them."""
    if one.kind == "images":
        return 3 * of_frame * one.most
    return 3 * pixels if one.kind in ("video", "image") else max(pixels, 4 * NUMBERS_A_ROW)


def check_beside(sample: VideoSample, media: Sequence[Media], taken: Taken) -> None:
    """Read the beginnings of videos beside a clip; raises what `read_beside` raises before it decodes."""
    for one in media:
        for file in sample.roles.get(one.name, ()):
            if one.kind in ("video", "mask") and kind_of(str(file)) == "video":
                _checked_video(file, taken)


def _video(files: Sequence[Path], taken: Taken) -> Tensor:
    """[3, F, H, W] of a video, or of an image beside an image."""
    (file,) = files
    if kind_of(str(file)) == "image":
        frame = read_image(file).permute(2, 0, 1).unsqueeze(0)
        _require_aspect(file, frame.shape[2], Fraction(frame.shape[3]), taken)
        return to_shape(frame, taken.shape).transpose(0, 1)
    info = _checked_video(file, taken)
    once = sorted(set(taken.indices))
    chunks = [to_shape(chunk, taken.shape) for chunk in read_frames(file, info, once, taken.reader)]
    frames = torch.cat(chunks)[torch.tensor([once.index(index) for index in taken.indices])]
    return frames.transpose(0, 1)


def _checked_video(file: Path, taken: Taken) -> VideoInfo:
    """Facts of a video that has the clip's frames and aspect; raises DATA-248 and DATA-249."""
    info = probe(file, taken.reader)
    _require_aspect(file, info.height, info.width * info.pixel_aspect, taken)
    if info.num_frames <= max(taken.indices):
        found = f"{file} ends after {info.num_frames} frames, and the clip beside it takes frame {max(taken.indices)}."
        remedy = "Give one that has a frame for each of the video's, or limit both with cut."
        raise DataError("DATA-248", found, remedy)
    return info


def _require_aspect(file: Path, height: int, width: Fraction, taken: Taken) -> None:
    """Refuse a picture that is not the target's at another size, rounded to whole pixels; raises DATA-249."""
    if abs(height * taken.width - width * taken.height) > taken.height + taken.width:
        found = (
            f"{file} shows {float(width):g}x{height} pixels, the video beside it {float(taken.width):g}x{taken.height}"
        )
        raise DataError("DATA-249", f"{found}: another aspect.", "Make it of the video itself, at any one scale.")


def _image(files: Sequence[Path], taken: Taken) -> Tensor:
    """[3, H, W] of an image of any size: it is resized to cover the clip's and cropped to the centre."""
    (file,) = files
    frame = read_image(file).permute(2, 0, 1).unsqueeze(0)
    size = taken.shape.height, taken.shape.width
    return to_shape(frame, fixed_shape(frame.shape[2], frame.shape[3], size, 1))[0]


def _images(files: Sequence[Path], taken: Taken) -> Tensor:
    """[R, 3, H, W] of images of any size, in their order: each on a white canvas, as in generation."""
    pixels = [read_image(file).permute(2, 0, 1).float() / 127.5 - 1 for file in files]
    return torch.stack([white_canvas(image, taken.shape.height, taken.shape.width) for image in pixels])


def _mask(files: Sequence[Path], taken: Taken) -> Tensor:
    """[F, H, W] from 0 to 1: the mean of the colours; an image is the mask of all frames."""
    grey = _video(files, taken).mean(0) / 2 + 0.5
    return grey.expand(len(taken.indices), -1, -1).clamp(0, 1)


def _poses(files: Sequence[Path], taken: Taken) -> Tensor:
    """[F + 1, 19] fp64: the clip's part of the picture (`view_row`), and a row for each of its frames."""
    (file,) = files
    rows = rows_of_frames(poses_of(file), taken.of, taken.indices)
    return torch.cat((view_row(taken.shape), rows))


def poses_of(file: Path) -> Tensor:
    """Rows of a pose file, [poses, 19] fp64; raises DATA-251 for each line that is wrong, and DATA-001."""
    try:
        return read_poses(file)
    except ConfigError as error:
        problems = [Problem("DATA-251", problem.message, problem.remedy) for problem in error.problems]
        raise_all(DataError, problems)
        raise


def view_row(shape: Shape) -> Tensor:
    """[1, 19] fp64: height and width of the clip, those that the picture was resized to, top and left, and zeros."""
    row = torch.zeros(1, NUMBERS_A_ROW, dtype=torch.float64)
    row[0, :6] = torch.tensor((shape.height, shape.width, *shape.cover, *shape.corner))
    return row


_READ: Mapping[MediaKind, Callable[[Sequence[Path], Taken], Tensor]] = {
    "video": _video,
    "image": _image,
    "images": _images,
    "mask": _mask,
    "poses": _poses,
}
