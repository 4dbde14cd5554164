"""Reading with decord, where it gives a video's frames as they are.

decord 0.6.0 seeks to wrong frames, or for ever, in whole families of files. It is asked only for H.264 in MP4 files
whose order of packets is certain, and only where its own times and key frames are the file's and its first frame has
the bits that PyAV's has. It fails on some widths, and knows no rotation and no formats of more than 8 bits.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.containers import name_for_ffmpeg
from mm.data.orientation import Pixels
from mm.data.packets import Order
from mm.errors import DataError

_FORMATS = ("yuv420p", "yuvj420p", "yuv444p")
_BAD_WIDTHS = (8, 12, 16, 24, 48, 72)  # it pads their rows and then fails; the only ones up to 2600
_SECONDS = 1e-3  # decord's times are of single precision
_CHUNK = 8


def require_decord() -> None:
    """Raises DataError DATA-007 when decord is not installed."""
    if importlib.util.find_spec("decord") is None:
        remedy = 'Install decord, or set video_reader_type to "auto".'
        raise DataError("DATA-007", "decord is asked for and not installed.", remedy)


def decord_agrees(file: Path, order: Order, pixel_format: str, first: Pixels) -> bool:
    """Test that decord finds the same frames in an MP4 file of H.264.

    Args:
        file: the video; every packet of it is shown, upright.
        order: of its packets. pixel_format: FFmpeg's name of it.
        first: the first frame, uint8 [H, W, 3].
    """
    if pixel_format not in _FORMATS or first.shape[1] in _BAD_WIDTHS:
        return False
    import decord

    try:
        video = decord.VideoReader(name_for_ffmpeg(file), num_threads=1)
        if len(video) != len(order.packets) or video.get_key_indices() != [frame for frame, _ in order.starts]:
            return False
        times = video.get_frame_timestamp(range(len(video)))[:, 0]
        if not np.allclose(times, order.times, rtol=1e-6, atol=_SECONDS):
            return False
        return np.array_equal(video[0].asnumpy(), first)
    except (decord.DECORDError, RuntimeError, IndexError, AssertionError):
        return False


def decord_frames(file: Path, indices: Sequence[int]) -> Iterator[Any]:
    """Frames, uint8 [H, W, 3], of a video with which decord agrees.

    Raises:
        ValueError: where decord cannot decode one.
    """
    import decord

    try:
        video = decord.VideoReader(name_for_ffmpeg(file), num_threads=1)
        for start in range(0, len(indices), _CHUNK):
            yield from video.get_batch(list(indices[start : start + _CHUNK])).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError) as error:
        raise ValueError(str(error)) from None
