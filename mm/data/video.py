"""Videos as pixels: the frames of a plain decode from the start, whichever of them are asked for.

PyAV reads. `probe` decodes a video whole where its headers do not prove in which order its packets are shown
(`mm.data.packets`); where they do it decodes the first frames, and reading begins at the last safe packet. decord reads
only where it is asked for and `mm.data.decord_reader` finds it right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from torch import Tensor

from mm.data.containers import announced_bytes, open_container, video_stream
from mm.data.decode import all_frames, frames_from, frames_in_order
from mm.data.decord_reader import decord_agrees, decord_frames, require_decord
from mm.data.files import require_regular_file
from mm.data.orientation import Orientation, Pixels, frame_orientation
from mm.data.packets import Order, lost_packet, order_of, read_packets
from mm.errors import DataError

Reader = Literal["auto", "decord", "pyav"]

MAX_SIDE = 16384  # pixels; a header that claims more is damaged or hostile
CHUNK_FRAMES = 8  # frames in memory at once at the video's own size
_MP4 = "mov,mp4,m4a,3gp,3g2,mj2"
_MAY_END_ANYWHERE = ("mpegts", "mpeg")
_CUT = "Cut the video where it changes, or replace it."
_REPLACE = "Replace the file; it is damaged or cut off."


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Facts of a video file.

    Attributes:
        num_frames: frames that a decode from the start shows.
        height, width: pixels of a frame, upright.
        pixel_aspect: width of a pixel by its height, upright.
        orientation: how the stored picture is made upright.
        pixel_format: FFmpeg's name of it.
        order: of the packets, where the headers prove it.
        read_by: the library that gives the frames; decord only where it was asked for.
        times: of the frames, in seconds, ascending; None where the file does not tell them.
    """

    num_frames: int
    height: int
    width: int
    pixel_aspect: Fraction
    orientation: Orientation
    pixel_format: str
    order: Order | None
    read_by: Literal["pyav", "decord"]
    times: tuple[float, ...] | None = None

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width of the picture in square pixels."""
        return self.height, max(1, round(self.width * self.pixel_aspect))


def probe(file: Path, reader: Reader = "auto") -> VideoInfo:
    """Open a video, count its frames and decode the first ones, or all where only that tells how many there are.

    Args:
        file: the video.
        reader: `decord` has it checked whether decord gives the same frames.

    Raises:
        DataError: DATA-001 when it is no readable file, DATA-002 when it is damaged or cut off, DATA-003 when it has no
            video stream, DATA-006 when its size makes no sense, DATA-007 when decord is asked for and not installed,
            DATA-096 when it is to be shown askew, DATA-097 when no decoder knows its codec, DATA-098 when the aspect of
            its pixels changes, DATA-099 when it is a list of other files, or text.
    """
    if reader == "decord":
        require_decord()
    require_regular_file(file, "video")
    _check_size_in_bytes(file)
    try:
        stored = _read_headers(file)
        info, first = _decode_ends(file, stored)
        if reader == "decord" and stored.suits_decord and info.orientation == Orientation() and info.order is not None:
            pixels = _upright(first, info, file)
            if decord_agrees(file, info.order, info.pixel_format, pixels):
                return replace(info, read_by="decord")
        return info
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _damaged(file, error) from None


def read_frames(file: Path, info: VideoInfo, indices: Sequence[int], reader: Reader = "auto") -> Iterator[Tensor]:
    """Decode chosen frames, a few at a time.

    Args:
        file: the video.
        info: what `probe` said of it.
        indices: ascending frame numbers below `info.num_frames`.
        reader: which library decodes; `decord` leaves it to PyAV where `info.read_by` does not name it.

    Yields:
        uint8 [n, 3, H, W], n <= CHUNK_FRAMES, RGB, upright.

    Raises:
        DataError: DATA-002 when a frame cannot be decoded, DATA-007 when decord is asked for and not installed,
            DATA-098 when a frame has another size, orientation or aspect than the first.
    """
    if reader == "decord":
        require_decord()
    try:
        with_decord = reader == "decord" and info.read_by == "decord"
        frames = decord_frames(file, indices) if with_decord else _chosen(file, info, indices)
        while chunk := list(islice(frames, CHUNK_FRAMES)):
            yield torch.from_numpy(np.ascontiguousarray(np.stack(chunk).transpose(0, 3, 1, 2)))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _damaged(file, error) from None


def _chosen(file: Path, info: VideoInfo, indices: Sequence[int]) -> Iterator[Pixels]:
    wanted = iter(indices)
    index = next(wanted, None)
    if index is None:
        return
    for number, frame in enumerate(frames_from(file, info.order, index), start=index):
        if number == index:
            yield _upright(frame, info, file)
            index = next(wanted, None)
            if index is None:
                return
    raise DataError("DATA-002", f"{file}: frame {index} cannot be decoded.", "Replace the file.")


@dataclass(frozen=True, slots=True)
class _Headers:
    """Facts that a container tells of its video, before anything is decoded.

    Attributes:
        order: of the packets, if it is certain.
        pixel_aspect: width of a stored pixel by its height.
        may_end_anywhere: nothing but the last picture tells whether the file is whole.
        suits_decord: H.264 in an MP4 file, of which every packet is shown.
    """

    order: Order | None
    pixel_aspect: Fraction
    may_end_anywhere: bool
    suits_decord: bool


def _read_headers(file: Path) -> _Headers:
    with open_container(file) as container:
        stream = video_stream(container)
        if stream is None:
            raise DataError("DATA-003", f"{file} has no video stream.", "Replace the file.")
        context = stream.codec_context
        if context is None:
            message = f"{file} has a video stream of a codec that no decoder here knows."
            raise DataError("DATA-097", message, "Encode it again (ffmpeg -i FILE out.mp4), or replace it.")
        _check_size(context.height, context.width, file)
        is_mp4 = container.format.name == _MP4
        num_announced = stream.frames
        packets = read_packets(container, stream)
        # of an MP4 file, what edit lists leave of what is announced, and what the fragments announce
        _check_complete(len(packets), len(stream.index_entries) if is_mp4 else num_announced, file)
        if (lost := lost_packet(packets)) is not None:
            raise DataError("DATA-002", f"{file} misses bytes at frame {lost} of {len(packets)}.", _REPLACE)
        order = order_of(packets, stream.time_base, context.reorder_depth)
        return _Headers(
            order,
            Fraction(stream.sample_aspect_ratio or 1),
            container.format.name in _MAY_END_ANYWHERE,
            is_mp4
            and context.codec.canonical_name == "h264"
            and order is not None
            and len(order.packets) == num_announced,
        )


def _decode_ends(file: Path, stored: _Headers) -> tuple[VideoInfo, Any]:
    """Decode the first frames, and the last one where only it tells that a video is whole; or all of them.

    Returns:
        What the file holds, and its first frame.
    """
    order = stored.order
    if order is not None:
        num_first = min(2 * order.delay + 2, len(order.packets))
        first_ones = list(islice(frames_in_order(file, order, 0), num_first))
        if len(first_ones) == num_first and (not stored.may_end_anywhere or _ends_whole(file, order)):
            return _describe(file, stored, order, first_ones[0], order.times), first_ones[0]
    first, times = None, list[float | None]()
    for frame in all_frames(file):
        first = frame if first is None else first
        times.append(frame.time)
    if first is None:
        raise DataError("DATA-002", f"{file} has no frame that can be decoded.", "Replace the file.")
    return _describe(file, stored, None, first, times), first


def _ends_whole(file: Path, order: Order) -> bool:
    return len(list(frames_in_order(file, order, len(order.packets) - 1))) == 1


def _describe(
    file: Path, stored: _Headers, order: Order | None, first: Any, times: Sequence[float | None]
) -> VideoInfo:
    _check_size(first.height, first.width, file)
    orientation = frame_orientation(first, file)
    height, width, aspect = first.height, first.width, stored.pixel_aspect
    if orientation.transposed:
        height, width, aspect = width, height, 1 / aspect
    known = tuple(time for time in times if time is not None)
    if len(known) < len(times) or any(later <= earlier for earlier, later in pairwise(known)):
        known = ()
    form = first.format.name
    info = VideoInfo(len(times), height, width, aspect, orientation, form, order, "pyav", known or None)
    _check_size(*info.shown_size, file)
    return info


def _upright(frame: Any, info: VideoInfo, file: Path) -> Pixels:
    orientation = frame_orientation(frame, file)
    pixels = orientation.apply(frame.to_ndarray(format="rgb24"))
    if orientation != info.orientation or pixels.shape != (info.height, info.width, 3):
        raise DataError("DATA-098", f"{file}: a frame has another size or orientation than the first.", _CUT)
    return pixels


def _check_size(height: int, width: int, file: Path) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        message = f"{file} claims {height} x {width} pixels; 1 to {MAX_SIDE} a side can be read."
        raise DataError("DATA-006", message, "Replace the file.")


def _check_size_in_bytes(file: Path) -> None:
    found, announced = file.stat().st_size, announced_bytes(file)
    if found == 0:
        raise DataError("DATA-002", f"{file} is empty (0 bytes).", "Replace the file.")
    if announced is not None and found < announced:
        raise DataError("DATA-002", f"{file} has {found} of {announced} bytes; it is cut off.", "Replace the file.")


def _check_complete(num_found: int, num_announced: int, file: Path) -> None:
    """`num_announced` is 0 where the container does not say."""
    if num_found == 0 or num_found < num_announced:
        announced = f" of {num_announced}" if num_announced else ""
        message = f"{file} holds {num_found}{announced} frames; it is damaged or cut off."
        raise DataError("DATA-002", message, "Replace the file.")


def _damaged(file: Path, error: Exception) -> DataError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return DataError("DATA-002", f"{file} cannot be decoded: {lines[0]}.", _REPLACE)
