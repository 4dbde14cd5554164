"""Video files as containers: how FFmpeg is given one, which of its streams is the video, and how long it says it is."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from mm.errors import DataError

_NO_VIDEOS = {
    **dict.fromkeys(("hls", "dash", "concat", "imf", "sdp", "webm_dash_manifest"), "a list of other files"),
    "image2": "a pattern that names other files",
    "tty": "text",
}
"""What FFmpeg would make a video of that is none, by its name of the format. Other files would be read without having
been named, wherever they are; and they may change while the one that was named, whose fingerprint is kept, does not."""

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # RFC 8794, RFC 9559
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the file properties object
_FLV, _FLV_FILE = b"FLV", b"filesize\0"  # a number in the data that most writers put first
_HEAD_BYTES = 65536


def name_for_ffmpeg(file: Path) -> str:
    """A file's absolute name; of another one FFmpeg may take what is before a colon for a protocol (`12:30.mp4`)."""
    return os.path.abspath(file)


@contextmanager
def open_container(file: Path) -> Iterator[Any]:
    """A file opened by PyAV.

    Raises:
        DataError: DATA-099 for what leads to other files, or is text.
        av.FFmpegError, OSError, ValueError: what PyAV raises.
    """
    with av.open(name_for_ffmpeg(file)) as container:
        if (what := _NO_VIDEOS.get(container.format.name)) is not None:
            remedy = "Give the video itself, in one file (ffmpeg -i FILE -c copy out.mp4)."
            raise DataError("DATA-099", f"{file} is {what}, not a video.", remedy)
        yield container


def video_stream(container: Any) -> Any:
    """The first stream of pictures that is no cover, as music files and films have one; None where there is none."""
    streams = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    return next(streams, None)


def announced_bytes(file: Path) -> int | None:
    """Bytes that a Matroska, WebM, ASF or FLV file has when it is whole; None where it does not say, and for others."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if head.startswith(_EBML):
        return _matroska_bytes(head)
    if head.startswith(_FLV) and (place := head.find(_FLV_FILE)) >= 0:
        number = head[place + len(_FLV_FILE) :][:8]
        return int(struct.unpack(">d", number)[0]) or None if len(number) == 8 else None
    if (place := head.find(_ASF_FILE)) >= 0:
        # after its identifier, its size and the file's identifier
        return int.from_bytes(head[place + 40 : place + 48], "little") or None
    return None


def _matroska_bytes(head: bytes) -> int | None:
    size, place = _ebml_number(head, len(_EBML))
    place += size or 0
    if head[place : place + 4] != _SEGMENT:
        return None
    size, place = _ebml_number(head, place + len(_SEGMENT))
    return None if size is None else place + size


def _ebml_number(data: bytes, place: int) -> tuple[int | None, int]:
    """A size and the place after it; None for one that was not known when it was written (all bits are set)."""
    length = 9 - data[place].bit_length() if place < len(data) and data[place] else 8
    value = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), place + length
