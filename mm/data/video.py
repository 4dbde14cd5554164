"""Videos as pixels, with decord where it is installed and with PyAV everywhere, and the same frames from both.

PyAV opens every video first, counts its frames and decodes the first one, so errors do not depend on the decoder.
decord 0.6.0 then reads what it reads right: 8-bit formats without a rotation mark. It returns wrong colours for 10-bit
video and fails on rotated video and on some widths, which therefore go to PyAV. One difference remains: of slight
damage inside a frame that FFmpeg papers over, PyAV tells us and decord does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mm.data.files import require_regular_file
from mm.errors import DataError

Reader = Literal["auto", "decord", "pyav"]
Pixels = npt.NDArray[np.uint8]

MAX_SIDE = 16384  # pixels; a header that claims more is damaged or hostile
CHUNK_FRAMES = 8  # frames in memory at once at the video's own size
_DECORD_FORMATS = ("yuv420p", "yuvj420p", "yuv444p")
_NOT_DECORDS_WIDTHS = (8, 12, 16, 24, 48, 72)  # it pads their rows and then fails; the only ones up to 2600


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        num_frames: frames that can be shown.
        height, width: pixels as shown, that is after rotation.
        rotation: quarter turns counter-clockwise that show the picture upright.
        pixel_format: FFmpeg's name of it.
        times: presentation time of every frame in units of the stream's time base, ascending.
    """

    num_frames: int
    height: int
    width: int
    rotation: int
    pixel_format: str
    times: tuple[int, ...]


def probe(file: Path) -> VideoInfo:
    """Open a video, count its frames and decode the first.

    Raises:
        DataError: DATA-001 when it is no readable file, DATA-002 when it is damaged or cut off, DATA-003 when it has no
            video stream, DATA-006 when its size makes no sense or its frames
            have no times.
    """
    require_regular_file(file, "video")
    if file.stat().st_size == 0:
        raise DataError("DATA-002", f"{file} is empty (0 bytes).", "Replace the file.")
    try:
        with av.open(str(file)) as container:
            if not container.streams.video:
                raise DataError("DATA-003", f"{file} has no video stream.", "Replace the file.")
            stream = container.streams.video[0]
            _check_size(stream.codec_context.height, stream.codec_context.width, file)
            times = _shown_times([p for p in container.demux(stream) if p.size and not p.is_discard], file)
            _check_complete(len(times), stream.frames, file)
        with av.open(str(file)) as container:
            first = next(container.decode(container.streams.video[0]), None)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _damaged(file, error) from None
    if first is None:
        raise DataError("DATA-002", f"{file} has no frame that can be decoded.", "Replace the file.")
    _check_size(first.height, first.width, file)
    turns = round(first.rotation / 90) % 4
    height, width = (first.width, first.height) if turns % 2 else (first.height, first.width)
    return VideoInfo(len(times), height, width, turns, first.format.name, tuple(times))


def read_frames(file: Path, info: VideoInfo, indices: Sequence[int], reader: Reader = "auto") -> Iterator[Tensor]:
    """Decode chosen frames, a few at a time.

    Args:
        file: the video.
        info: what `probe` said of it.
        indices: ascending frame numbers below `info.num_frames`.
        reader: which library decodes; see the module's text for when `decord` leaves it to PyAV.

    Yields:
        uint8 [n, 3, H, W], n <= CHUNK_FRAMES, RGB, upright.

    Raises:
        DataError: DATA-002 when a frame cannot be decoded, DATA-007 when decord is asked for and not installed.
    """
    read = _read_with_decord if _use_decord(info, reader) else _read_with_pyav
    try:
        for chunk in read(file, info, indices):
            yield torch.from_numpy(np.ascontiguousarray(chunk.transpose(0, 3, 1, 2)))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _damaged(file, error) from None


def _use_decord(info: VideoInfo, reader: Reader) -> bool:
    installed = importlib.util.find_spec("decord") is not None
    if reader == "decord" and not installed:
        remedy = 'Install decord, or set video_reader_type to "auto".'
        raise DataError("DATA-007", "decord is asked for and not installed.", remedy)
    reads_right = info.rotation == 0 and info.pixel_format in _DECORD_FORMATS and info.width not in _NOT_DECORDS_WIDTHS
    return reader != "pyav" and installed and reads_right


def _read_with_decord(file: Path, info: VideoInfo, indices: Sequence[int]) -> Iterator[Pixels]:
    import decord  # optional: there is no wheel for Arm

    try:
        video = decord.VideoReader(str(file), num_threads=1)
        for start in range(0, len(indices), CHUNK_FRAMES):
            yield video.get_batch(list(indices[start : start + CHUNK_FRAMES])).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise _damaged(file, error) from None


def _read_with_pyav(file: Path, info: VideoInfo, indices: Sequence[int]) -> Iterator[Pixels]:
    """Seek to the key frame before the first wanted frame and decode on, picking frames by their time."""
    wanted = [info.times[index] for index in indices]
    chunk: list[Pixels] = []
    taken = 0
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(wanted[0], stream=stream, backward=True)
        for frame in container.decode(stream):
            if taken < len(wanted) and frame.pts == wanted[taken]:
                chunk.append(_upright(frame, info, file))
                taken += 1
            if len(chunk) == CHUNK_FRAMES or (chunk and taken == len(wanted)):
                yield np.stack(chunk)
                chunk = []
            if taken == len(wanted):
                return
    raise DataError("DATA-002", f"{file}: frame {indices[taken]} cannot be decoded.", "Replace the file.")


def _upright(frame: Any, info: VideoInfo, file: Path) -> Pixels:
    pixels: Pixels = np.rot90(frame.to_ndarray(format="rgb24"), info.rotation)
    if frame.is_corrupt or pixels.shape != (info.height, info.width, 3):
        raise DataError("DATA-002", f"{file}: a frame is damaged or changes its size.", "Replace the file.")
    return pixels


def _check_size(height: int, width: int, file: Path) -> None:
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        message = f"{file} claims {height} x {width} pixels; 1 to {MAX_SIDE} a side can be read."
        raise DataError("DATA-006", message, "Replace the file.")


def _shown_times(packets: list[Any], file: Path) -> list[int]:
    times = [packet.pts for packet in packets]
    if None in times:
        message = f"{file} has frames without a time of their own."
        raise DataError("DATA-006", message, "Put the video into an mp4 container (ffmpeg -i in -c copy out.mp4).")
    return sorted(times)


def _check_complete(num_found: int, num_announced: int, file: Path) -> None:
    """`num_announced` is 0 where the container does not say."""
    if num_found == 0 or num_found < num_announced:
        announced = f" of {num_announced}" if num_announced else ""
        message = f"{file} holds {num_found}{announced} frames; it is damaged or cut off."
        raise DataError("DATA-002", message, "Replace the file.")


def _damaged(file: Path, error: Exception) -> DataError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        "DATA-002", f"{file} cannot be decoded: {lines[0]}.", "Replace the file; it is damaged or cut off."
    )
