"""Clips from listed videos, as they are encoded: the frames, and what the annotation said of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm.config.run.extraction import SourceClip
from mm.config.run.shapes import FrameRule
from mm.config.tasks.task import Media
from mm.data.annotation_check import check_annotation, check_image
from mm.data.beside import Taken, check_beside, numbers_of, read_beside
from mm.data.image import probe_image, read_image
from mm.data.metadata import VideoSample
from mm.data.remote.media import reading
from mm.data.shapes.choose import choose_shape, fewest_frames, most_pixels, most_pixels_of_frame
from mm.data.shapes.frames import frames_at_times, shortened, starts_at, usable_at
from mm.data.shapes.shape import Shape, left_out
from mm.data.transforms import to_shape
from mm.data.video import VideoInfo, probe, read_frames
from mm.data.workers import Parcel, bytes_to_share, read_in_order
from mm.errors import DataError
from mm.rng import generator

_PILLOW = "pillow"
_PIXELS, _BESIDE = "pixels", "beside "


@dataclass(frozen=True)
class Clip:
    """A clip ready to encode.

    Attributes:
        pixels: float32 [3, F, H, W] in [-1, 1].
        start: number of its first frame in the video.
        read_by: the library that read it, decord, pyav or pillow.
        taken: what a rule chose: the frames' numbers, the size that the picture was resized to, and the top and left
            of the clip in it; None where the clip is of one size and its frames follow from `start`.
        key: the seed, the sample's id and the draw, by which all is drawn that is drawn of it.
        beside: what the task takes beside it, by role, as `mm.data.beside.read_beside` gives it.
    """

    pixels: Tensor
    start: int
    read_by: str
    taken: dict[str, Any] | None = None
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    key: tuple[int, str, int] = (0, "", 0)

    @property
    def num_frames(self) -> int:
        """F."""
        return self.pixels.shape[1]


def load_clip(
    sample: VideoSample, preprocess: SourceClip, seed: int, draw: int = 0, media: Sequence[Media] = ()
) -> Clip:
    """Read, resize and crop a clip of a sample, its first or another `draw`; an image gives a clip of one frame.

    With it comes what the task takes beside it, its `media`.

    Raises:
        DataError: what `mm.data.video` and `mm.data.image` raise, DATA-004 when the video is too short, DATA-005 when
            it is not what its annotation says, DATA-160 and DATA-161 what `mm.data.shapes.choose.choose_shape` raises,
            DATA-160 for a video that is too long, DATA-162 for one without times; of media what
            `mm.data.beside.read_beside` raises.
    """
    return reading(sample.objects, partial(_load, sample, preprocess, seed, draw, media))


def _load(sample: VideoSample, preprocess: SourceClip, seed: int, draw: int, media: Sequence[Media]) -> Clip:
    if sample.kind == "image":
        return _load_image(sample, preprocess, seed, draw, media)
    info, shape, indices = _plan_clip(sample, preprocess, seed, draw)
    once = sorted(set(indices))  # a rate above the video's takes frames more than once
    frames = torch.cat([to_shape(chunk, shape) for chunk in read_frames(sample.file, info, once, preprocess.reader)])
    if len(once) < len(indices):
        frames = frames[torch.tensor([once.index(index) for index in indices])]
    pixels = frames.transpose(0, 1)
    beside = read_beside(sample, media, pixels, _part(info, shape, indices, preprocess), seed, draw)
    return Clip(pixels, indices[0], info.read_by, _taken(preprocess, shape, indices), beside, (seed, sample.id, draw))


def _part(info: VideoInfo, shape: Shape, indices: Sequence[int], preprocess: SourceClip) -> Taken:
    """The part of a video that a clip is."""
    width = info.width * info.pixel_aspect
    return Taken("video", info.height, width, shape, indices, info.num_frames, preprocess.reader)


class ClipFacts(NamedTuple):
    """Facts of a clip that was not decoded: number of its first frame in the video, frames, height and width."""

    start: int
    frames: int
    height: int
    width: int


def clip_facts(
    sample: VideoSample, preprocess: SourceClip, seed: int, draw: int = 0, media: Sequence[Media] = ()
) -> ClipFacts:
    """Facts of the clip that `load_clip` gives, without decoding it; raises what that raises before it decodes."""
    return reading(sample.objects, partial(_facts, sample, preprocess, seed, draw, media))


def _facts(sample: VideoSample, preprocess: SourceClip, seed: int, draw: int, media: Sequence[Media]) -> ClipFacts:
    if sample.kind == "image":
        size = probe_image(sample.file)
        check_image(sample, *size)
        shape = _shape_of(sample, preprocess, *size, 1, (seed, draw))
        return ClipFacts(0, 1, shape.height, shape.width)
    info, shape, indices = _plan_clip(sample, preprocess, seed, draw)
    check_beside(sample, media, _part(info, shape, indices, preprocess))
    return ClipFacts(indices[0], len(indices), shape.height, shape.width)


def _load_image(sample: VideoSample, preprocess: SourceClip, seed: int, draw: int, media: Sequence[Media] = ()) -> Clip:
    pixels = read_image(sample.file)
    height, width = pixels.shape[:2]
    check_image(sample, height, width)
    shape = _shape_of(sample, preprocess, height, width, 1, (seed, draw))
    clip = to_shape(pixels.permute(2, 0, 1).unsqueeze(0), shape).transpose(0, 1)
    of_image = Taken(sample.kind, height, Fraction(width), shape, [0], 1, preprocess.reader)
    beside = read_beside(sample, media, clip, of_image, seed, draw)
    return Clip(clip, 0, _PILLOW, _taken(preprocess, shape, [0]), beside, (seed, sample.id, draw))


def clip_of_frames(
    frames: Tensor, sample: VideoSample, preprocess: SourceClip, seed: int, media: Sequence[Media] = ()
) -> Clip:
    """The clip of a video that is in memory, uint8 [F, H, W, 3]; chosen, resized and cropped as `load_clip` does.

    Raises:
        DataError: DATA-004 when it is too short; of media what `mm.data.beside.read_beside` raises.
    """
    shape = _shape_of(sample, preprocess, frames.shape[1], frames.shape[2], len(frames), (seed, 0))
    indices = choose_frames(sample, len(frames), preprocess, seed, most=shape.frames)
    pixels = to_shape(frames[list(indices)].permute(0, 3, 1, 2), shape).transpose(0, 1)
    given = Taken("video", frames.shape[1], Fraction(frames.shape[2]), shape, indices, len(frames), preprocess.reader)
    beside = read_beside(sample, media, pixels, given, seed, 0)
    return Clip(pixels, indices[0], "memory", _taken(preprocess, shape, indices), beside, (seed, sample.id, 0))


def _plan_clip(
    sample: VideoSample, preprocess: SourceClip, seed: int, draw: int = 0
) -> tuple[VideoInfo, Shape, Sequence[int]]:
    """Facts of the video, its shape, and the indices of the frames that are taken."""
    info = probe(sample.file, preprocess.reader)
    check_annotation(sample, info)
    shape = _shape_of(sample, preprocess, info.height, info.width * info.pixel_aspect, info.num_frames, (seed, draw))
    indices = choose_frames(sample, info.num_frames, preprocess, seed, most=shape.frames, times=info.times, draw=draw)
    return info, shape, indices


def _shape_of(
    sample: VideoSample,
    preprocess: SourceClip,
    height: int,
    width: Fraction | int,
    num_frames: int,
    chance: tuple[int, int],
) -> Shape:
    """The sample's shape, or the error of its rule with the file's name; `chance` is (seed, draw)."""
    seed, draw = chance
    try:
        return choose_shape(preprocess, height, width, num_frames, generator(seed, "shape_choice", sample.id, draw))
    except DataError as error:
        problem = error.problems[0]
        message = f"{sample.where}: {problem.message[:1].lower()}{problem.message[1:]}"
        raise DataError(problem.id, message, problem.remedy) from None


def _taken(preprocess: SourceClip, shape: Shape, indices: Sequence[int]) -> dict[str, Any] | None:
    if preprocess.shape is None and preprocess.frames == FrameRule():
        return None
    return {"frames": list(indices), "resized": list(shape.cover), "corner": list(shape.corner)}


@dataclass(frozen=True)
class _ReadClip:
    """`load_clip` in a process of its own."""

    preprocess: SourceClip
    seed: int
    media: Sequence[Media]

    def __call__(self, job: tuple[VideoSample, int], /) -> Parcel:
        sample, draw = job
        clip = load_clip(sample, self.preprocess, self.seed, draw, self.media)
        return Parcel(*in_parts(clip))

    def describe(self, job: tuple[VideoSample, int], /) -> str:
        return job[0].where


def read_clips(
    jobs: Iterable[tuple[VideoSample, int]],
    preprocess: SourceClip,
    seed: int,
    *,
    num_workers: int,
    time_limit: float,
    media: Sequence[Media] = (),
) -> Generator[Clip | DataError]:
    """The clips of samples and draws, in order, read ahead by `num_workers` processes; jobs are taken as they are read.

    A sample whose clip cannot be read gives the error that `load_clip` raises, DATA-070 when it takes longer than
    `time_limit` seconds, or DATA-071 when its reader died twice.
    """
    outcomes = read_in_order(
        _ReadClip(preprocess, seed, media),
        jobs,
        num_workers=num_workers,
        time_limit=time_limit,
        buffer_bytes=clip_bytes(preprocess, media),
    )
    for _, outcome in outcomes:
        yield outcome if isinstance(outcome, DataError) else of_parts(outcome.tensors, outcome.facts)


def in_parts(clip: Clip) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a clip by name, and the rest, which JSON can spell."""
    facts = {"start": clip.start, "read_by": clip.read_by, "key": list(clip.key)}
    tensors = {_PIXELS: clip.pixels} | {f"{_BESIDE}{role}": value for role, value in clip.beside.items()}
    return tensors, facts if clip.taken is None else facts | {"taken": clip.taken}


def of_parts(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Clip:
    """The clip that `in_parts` took apart."""
    beside = {name.removeprefix(_BESIDE): value for name, value in tensors.items() if name.startswith(_BESIDE)}
    return Clip(tensors[_PIXELS], **{**facts, "key": tuple(facts["key"])}, beside=beside)


def clip_bytes(preprocess: SourceClip, media: Sequence[Media]) -> int:
    """The most bytes that the tensors of a clip take, with what is beside it."""
    pixels, of_frame = most_pixels(preprocess), most_pixels_of_frame(preprocess)
    return bytes_to_share((3, pixels), *((numbers_of(one, pixels, of_frame),) for one in media))


@dataclass(frozen=True)
class CheckClip:
    """Reads what `load_clip` would and keeps nothing; `quick` stops before any frame of the clip is decoded."""

    preprocess: SourceClip
    seed: int
    quick: bool
    media: Sequence[Media] = ()

    def __call__(self, sample: VideoSample, /) -> Parcel:
        """Tells which library reads the clip; raises what `load_clip` raises."""
        if self.quick and sample.kind == "image":
            clip_facts(sample, self.preprocess, self.seed)
            read_by = _PILLOW
        elif self.quick:
            read_by = reading(sample.objects, partial(self._begun, sample))
        else:
            read_by = load_clip(sample, self.preprocess, self.seed, media=self.media).read_by
        return Parcel({}, {"read_by": read_by})

    def _begun(self, sample: VideoSample) -> str:
        info, shape, indices = _plan_clip(sample, self.preprocess, self.seed)
        check_beside(sample, self.media, _part(info, shape, indices, self.preprocess))
        return info.read_by

    def describe(self, sample: VideoSample, /) -> str:
        """The video."""
        return sample.where


def choose_frames(
    sample: VideoSample,
    num_available: int,
    preprocess: SourceClip,
    seed: int,
    *,
    most: int | None = None,
    times: Sequence[float] | None = None,
    draw: int = 0,
) -> Sequence[int]:
    """The frames of a sample's clip, ascending, from a start drawn from the seed or the first.

    They are contiguous up to `frame_interval`, or those nearest to a rate's moments. A video that is long enough gives
    as many as its shape has. A shorter one is refused, or, where `min_num_frames` allows it, gives 4k + 1 frames.

    Args:
        sample: whose clip; its annotation's `cut` limits the frames to use.
        num_available: frames of the whole video.
        preprocess: the clip's rules.
        seed: the run's seed.
        most: frames of its shape; default: `num_frames`.
        times: of all frames, in seconds, where they are known.
        draw: which of the sample's clips.

    Raises:
        DataError: DATA-004 when the video is too short, DATA-005 when `cut` lies outside it, DATA-160 when it is too
            long, DATA-162 when a rate is asked for and no times are known.
    """
    begin, end = _cut(sample, num_available)
    rule, interval = preprocess.frames, preprocess.frame_interval
    if rule.max_frames is not None and end - begin > rule.max_frames:
        message = f"{sample.where} has {end - begin} frames, and at most {rule.max_frames} are taken."
        raise left_out(message, "Remove the sample, cut it, or raise max_frames.")
    shown = _times_of(sample, preprocess, times, begin, end)
    usable = (end - begin - 1) // interval + 1 if rule.fps is None else usable_at(shown, rule.fps)
    length = _length(sample, usable, preprocess, preprocess.num_frames if most is None else most)
    starts = (end - begin) - (length - 1) * interval if rule.fps is None else starts_at(shown, rule.fps, length)
    start = 0
    if rule.start == "random":
        start = int(torch.randint(starts, (), generator=generator(seed, "frame_choice", sample.id, draw)))
    if rule.fps is not None:
        return [begin + index for index in frames_at_times(shown, start, rule.fps, length)]
    start += begin
    return range(start, start + (length - 1) * interval + 1, interval)


def _length(sample: VideoSample, usable: int, preprocess: SourceClip, most: int) -> int:
    """Number of frames of the clip; raises DATA-004."""
    if usable >= most:
        return most
    least, multiple = preprocess.min_num_frames, preprocess.frames.length_multiple
    if least is not None and usable >= least and (length := shortened(usable, multiple)):
        return length
    every = f" every {preprocess.frame_interval}" if preprocess.frame_interval > 1 else ""
    every = every if preprocess.frames.fps is None else f" at {preprocess.frames.fps:g} a second"
    wanted = most if least is None else max(least, multiple or 1)
    raise DataError(
        "DATA-004",
        f"{sample.where} has {usable} frames to use{every}, and at least {wanted} are asked for.",
        "Remove the video, lower num_frames, or accept shorter ones where min_num_frames can be set (docs/data.md).",
    )


def _times_of(
    sample: VideoSample, preprocess: SourceClip, times: Sequence[float] | None, begin: int, end: int
) -> Sequence[float]:
    """The times of the frames to use; none where frames are taken by number."""
    if preprocess.frames.fps is None:
        return ()
    if times is None:
        message = f"{sample.where}: it does not tell when its frames are shown, and fps takes them by their times."
        raise DataError("DATA-162", message, "Put it into another form (ffmpeg -i IN out.mp4), or set no fps.")
    return times[begin:end]


def check_announced_length(sample: VideoSample, preprocess: SourceClip) -> None:
    """Refuse a video that is too short by its own annotation, before hours of work lead to it.

    Raises:
        DataError: DATA-004; DATA-160 for one that is too long.
    """
    announced = sample.annotation.num_frames
    if sample.kind == "image" or announced is None:
        return
    if sample.annotation.cut is not None or preprocess.frames.fps is not None:
        return
    if announced > 1 or preprocess.shape is None:  # a shape rule takes one frame for an image
        choose_frames(sample, announced, preprocess, seed=0, most=fewest_frames(preprocess))


def _cut(sample: VideoSample, num_available: int) -> tuple[int, int]:
    cut = sample.annotation.cut or [0]
    begin, end = cut[0], cut[1] if len(cut) == 2 else num_available
    if not begin < end <= num_available:
        message = f"{sample.where} has {num_available} frames, and its annotation cuts {begin} to {end}."
        raise DataError("DATA-005", message, "Correct cut: [first frame] or [first frame, frame to stop before].")
    return begin, end
