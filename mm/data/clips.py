"""Clips from listed videos, as they are encoded: the frames, and what the annotation said of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.extraction import SourceClip
from mm.data.files import raise_limited
from mm.data.image import probe_image, read_image
from mm.data.metadata import VideoSample
from mm.data.transforms import resize_and_crop
from mm.data.video import VideoInfo, probe, read_frames
from mm.data.workers import Parcel, bytes_to_share, read_in_order
from mm.errors import DataError, Problem
from mm.rng import generator

_PILLOW = "pillow"


@dataclass(frozen=True)
class Clip:
    """A clip ready to encode.

    Attributes:
        pixels: float32 [3, F, H, W] in [-1, 1].
        start: number of its first frame in the video.
        read_by: the library that read it, decord, pyav or pillow.
    """

    pixels: Tensor
    start: int
    read_by: str

    @property
    def num_frames(self) -> int:
        """F."""
        return self.pixels.shape[1]


def load_clip(sample: VideoSample, preprocess: SourceClip, seed: int) -> Clip:
    """Read, resize and crop the clip of one sample; an image gives a clip of one frame.

    Raises:
        DataError: what `mm.data.video` and `mm.data.image` raise, DATA-004 when the video is too short, DATA-005 when
            it is not what its annotation says.
    """
    if sample.kind == "image":
        pixels = read_image(sample.file)
        _check_image(sample, *pixels.shape[:2])
        frame = resize_and_crop(pixels.permute(2, 0, 1).unsqueeze(0), preprocess.height, preprocess.width)
        return Clip(frame.transpose(0, 1), 0, _PILLOW)
    info, indices = _clip_frames(sample, preprocess, seed)
    chunks = read_frames(sample.file, info, indices, preprocess.reader)
    size = preprocess.height, preprocess.width
    frames = torch.cat([resize_and_crop(chunk, *size, info.pixel_aspect) for chunk in chunks])
    return Clip(frames.transpose(0, 1), indices[0], info.read_by)


def clip_of_frames(frames: Tensor, sample: VideoSample, preprocess: SourceClip, seed: int) -> Clip:
    """The clip of a video that is in memory, uint8 [F, H, W, 3]; chosen, resized and cropped as `load_clip` does.

    Raises:
        DataError: DATA-004 when it is too short.
    """
    indices = choose_frames(sample, len(frames), preprocess, seed)
    chosen = frames[indices.start : indices.stop : indices.step].permute(0, 3, 1, 2)
    pixels = resize_and_crop(chosen, preprocess.height, preprocess.width)
    return Clip(pixels.transpose(0, 1), indices.start, "memory")


def _clip_frames(sample: VideoSample, preprocess: SourceClip, seed: int) -> tuple[VideoInfo, range]:
    """Facts of the video, and the indices of the frames that are taken."""
    info = probe(sample.file, preprocess.reader)
    check_annotation(sample, info)
    return info, choose_frames(sample, info.num_frames, preprocess, seed)


@dataclass(frozen=True)
class _ReadClip:
    """`load_clip` in a process of its own."""

    preprocess: SourceClip
    seed: int

    def __call__(self, sample: VideoSample, /) -> Parcel:
        clip = load_clip(sample, self.preprocess, self.seed)
        return Parcel({"pixels": clip.pixels}, {"start": clip.start, "read_by": clip.read_by})

    def describe(self, sample: VideoSample, /) -> str:
        return str(sample.file)


def read_clips(
    samples: Sequence[VideoSample], preprocess: SourceClip, seed: int, *, num_workers: int, time_limit: float
) -> Generator[Clip | DataError]:
    """The clips of samples, in order, read ahead by `num_workers` processes.

    A sample whose clip cannot be read gives the error that `load_clip` raises, DATA-070 when it takes longer than
    `time_limit` seconds, or DATA-071 when its reader died twice.
    """
    shape = 3, preprocess.num_frames, preprocess.height, preprocess.width
    outcomes = read_in_order(
        _ReadClip(preprocess, seed),
        samples,
        num_workers=num_workers,
        time_limit=time_limit,
        buffer_bytes=bytes_to_share(shape),
    )
    for _, outcome in outcomes:
        yield outcome if isinstance(outcome, DataError) else Clip(outcome.tensors["pixels"], **outcome.facts)


@dataclass(frozen=True)
class CheckClip:
    """Reads what `load_clip` would and keeps nothing; `quick` stops before any frame of the clip is decoded."""

    preprocess: SourceClip
    seed: int
    quick: bool

    def __call__(self, sample: VideoSample, /) -> Parcel:
        """Tells which library reads the clip; raises what `load_clip` raises."""
        if self.quick and sample.kind == "image":
            _check_image(sample, *probe_image(sample.file))
            read_by = _PILLOW
        elif self.quick:
            read_by = _clip_frames(sample, self.preprocess, self.seed)[0].read_by
        else:
            read_by = load_clip(sample, self.preprocess, self.seed).read_by
        return Parcel({}, {"read_by": read_by})

    def describe(self, sample: VideoSample, /) -> str:
        """The video."""
        return str(sample.file)


def choose_frames(sample: VideoSample, num_available: int, preprocess: SourceClip, seed: int) -> range:
    """The frames of a sample's clip: contiguous up to `frame_interval`, from a start drawn from the seed.

    A video that is long enough gives `num_frames`. A shorter one is refused, or, where `min_num_frames` allows it,
    gives the largest 4k + 1 frames it has.

    Args:
        sample: whose clip; its annotation's `cut` limits the frames to use.
        num_available: frames of the whole video.
        preprocess: the clip's rules.
        seed: the run's seed.

    Raises:
        DataError: DATA-004 when the video is too short, DATA-005 when `cut` lies outside it.
    """
    begin, end = _cut(sample, num_available)
    interval = preprocess.frame_interval
    usable = (end - begin - 1) // interval + 1
    if usable >= preprocess.num_frames:
        length = preprocess.num_frames
    elif preprocess.min_num_frames is not None and usable >= preprocess.min_num_frames:
        length = (usable - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
    else:
        least = preprocess.num_frames if preprocess.min_num_frames is None else preprocess.min_num_frames
        every = f" every {interval}" if interval > 1 else ""
        raise DataError(
            "DATA-004",
            f"{sample.file} has {usable} frames to use{every}, and at least {least} are asked for.",
            "Remove the video, lower num_frames, or set min_num_frames to accept shorter ones.",
        )
    slack = (end - begin) - ((length - 1) * interval + 1)
    start = begin + int(torch.randint(slack + 1, (), generator=generator(seed, "frame_choice", sample.id, 0)))
    return range(start, start + (length - 1) * interval + 1, interval)


def check_announced_length(sample: VideoSample, preprocess: SourceClip) -> None:
    """Refuse a video that is too short by its own annotation, before hours of work lead to it.

    Raises:
        DataError: DATA-004.
    """
    if sample.kind == "video" and sample.annotation.num_frames is not None and sample.annotation.cut is None:
        choose_frames(sample, sample.annotation.num_frames, preprocess, seed=0)


def check_annotation(sample: VideoSample, info: VideoInfo) -> None:
    """Compare what the annotation says with the video.

    `num_frames` is compared only where there is no `cut`, which may be counted or not. `resolution` may be that of the
    picture as it is stored upright or, where pixels are not square, as it is shown: tools tell either.

    Raises:
        DataError: DATA-005, all differences at once.
    """
    shown = _Size(*info.shown_size)
    _compare(sample, info.num_frames, _Size(info.height, info.width), shown)


def _check_image(sample: VideoSample, height: int, width: int) -> None:
    """`check_annotation` of an image."""
    size = _Size(height, width)
    _compare(sample, 1, size, size)


class _Size(NamedTuple):
    height: int
    width: int


def _compare(sample: VideoSample, num_frames: int, stored: _Size, shown: _Size) -> None:
    said = sample.annotation
    problems = []
    if said.num_frames is not None and said.cut is None and said.num_frames != num_frames:
        problems.append(_differs(sample, f"num_frames {said.num_frames}", f"{num_frames} frames"))
    if said.resolution is not None and (said.resolution.height, said.resolution.width) not in (stored, shown):
        claimed = f"height {said.resolution.height}, width {said.resolution.width}"
        as_shown = "" if stored == shown else f", shown as {shown.height} x {shown.width}"
        problems.append(_differs(sample, claimed, f"height {stored.height}, width {stored.width}{as_shown}"))
    raise_limited(problems)


def _differs(sample: VideoSample, claimed: str, found: str) -> Problem:
    message = f"{sample.file}: the annotation says {claimed}, the {sample.kind} has {found}."
    return Problem("DATA-005", message, f"Correct the annotation, or replace the {sample.kind} if it is the wrong one.")


def _cut(sample: VideoSample, num_available: int) -> tuple[int, int]:
    cut = sample.annotation.cut or [0]
    begin, end = cut[0], cut[1] if len(cut) == 2 else num_available
    if not begin < end <= num_available:
        message = f"{sample.file} has {num_available} frames, and its annotation cuts {begin} to {end}."
        raise DataError("DATA-005", message, "Correct cut: [first frame] or [first frame, frame to stop before].")
    return begin, end
