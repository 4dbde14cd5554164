"""What a thread is doing, read from its stack: whether it waits for other ranks, and where."""

from __future__ import annotations

import functools
import linecache
import sys
import threading
from pathlib import Path
from types import FrameType

_WAITS = (".wait(", ".cpu()", "synchronize(")
_PACKAGE = Path(__file__).parents[1]


def where_is(thread: int) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the call it is in with the line of this package that made it.

    The backward pass may run in a thread that Python does not know by name; then that one is looked at.
    """
    frames = sys._current_frames()
    innermost = frames.get(thread)
    if innermost is None:
        return False, ""
    if _in(innermost, "torch/autograd/"):
        known = {found.ident for found in threading.enumerate()}
        innermost = next((frame for ident, frame in frames.items() if ident not in known), innermost)
    # A frame between two lines has no number, whatever its type says.
    waits = _is_wait(innermost.f_code.co_filename, innermost.f_lineno or 0)
    call, collective = innermost.f_code.co_name, ""
    frame: FrameType | None = innermost
    while frame is not None and _in_package(frame.f_code.co_filename) is None:
        if _in(frame, "torch/distributed/"):
            waits, collective = True, collective or frame.f_code.co_name  # what it calls in turn says less
        frame = frame.f_back
    call = collective or call
    if frame is None:
        return waits, call
    file = _in_package(frame.f_code.co_filename)
    return waits, f"{call}, mm/{file}:{frame.f_lineno} ({frame.f_code.co_name})"


@functools.lru_cache(maxsize=4096)
def _in_package(file: str) -> str | None:
    """A file's path inside this package; None for others. Kept, as a look asks for every frame of a deep stack."""
    path = Path(file)
    return str(path.relative_to(_PACKAGE)) if path.is_relative_to(_PACKAGE) else None


@functools.lru_cache(maxsize=4096)
def _is_wait(file: str, line: int) -> bool:
    """Whether a line of source waits for others. The file's other lines are not kept: all of torch's are megabytes."""
    kept = file in linecache.cache
    text = linecache.getline(file, line)
    if not kept:
        linecache.cache.pop(file, None)
    return any(word in text for word in _WAITS)


def _in(frame: FrameType, folder: str) -> bool:
    return folder in frame.f_code.co_filename
