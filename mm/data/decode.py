"""Decoded PyAV frames of a video from a chosen one on: those of a plain decode from the start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.data.containers import open_container, video_stream
from mm.data.packets import Order
from mm.errors import DataError


def frames_from(file: Path, order: Order | None, first: int) -> Iterator[Any]:
    """Frames `first`, `first` + 1, ... to the end of a video.

    Decoding begins at the last start before `first`. Where the frames then come otherwise than the order of packets
    says, or there is no such order, all is decoded from the first packet on, and frames are counted.

    Raises:
        DataError: DATA-002 at a frame that is damaged, also where it only leads to the first one, DATA-098 where the
            aspect of pixels changes.
        av.FFmpegError, OSError, ValueError: what PyAV raises at packets that cannot be decoded.
    """
    index = first
    if order is not None:
        for frame in frames_in_order(file, order, first):
            yield frame
            index += 1
        if index == len(order.packets):
            return
    for number, frame in enumerate(all_frames(file)):
        if number >= index:
            yield frame


def all_frames(file: Path) -> Iterator[Any]:
    """Every frame, decoded from the first packet on; raises what `frames_from` raises."""
    with open_container(file) as container:
        stream = _stream(container)
        aspect = None
        for frame in container.decode(stream):
            found = stream.codec_context.sample_aspect_ratio
            aspect = found if aspect is None else aspect
            if found != aspect:
                message = f"{file}: the aspect of its pixels changes from {aspect} to {found}."
                raise DataError("DATA-098", message, "Cut the video where it changes, or replace it.")
            yield _undamaged(frame, file)


def frames_in_order(file: Path, order: Order, first: int) -> Iterator[Any]:
    """Frames from `first` on as long as each is the one that its packet's place says.

    Packets are read from the beginning of the file and decoded from the last start before `first`. In place of its time
    a packet gets its number, which the decoder hands on to its frame. Raises what `frames_from` raises.
    """
    index, start = order.start_before(first)
    with open_container(file) as container:
        stream = _stream(container)
        began = False
        for number, packet in enumerate(container.demux(stream)):
            if number < start and packet.size:
                continue
            if packet.size:
                packet.pts = number
            for frame in stream.decode(packet):
                began = began or frame.pts == order.packets[index]
                if not began:  # leads the start, and may refer to what lies before it
                    continue
                if index == len(order.packets) or frame.pts != order.packets[index]:
                    return
                _undamaged(frame, file)
                if index >= first:
                    yield frame
                index += 1


def _stream(container: Any) -> Any:
    """The video, for threads of whole frames: with threads of slices FFmpeg tells less of what is damaged."""
    stream = video_stream(container)
    stream.thread_type = "FRAME"
    return stream


def _undamaged(frame: Any, file: Path) -> Any:
    if frame.is_corrupt:
        raise DataError("DATA-002", f"{file}: a frame is damaged.", "Replace the file; it is damaged or cut off.")
    return frame
