"""Activity of a thread, read from its stack: whether it waits for other ranks, and where.

Stacks are read as text from `faulthandler`, which walks them in one call that nothing interrupts. The frames of
`sys._current_frames()` are not safe to walk while their thread goes on: on CPython 3.11.7 such looks at a thread that
trains soon found objects that are no frames, or crashed (compare https://github.com/python/cpython/issues/111363).
"""

from __future__ import annotations

import faulthandler
import functools
import linecache
import re
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

_WAITS = (".wait(", ".cpu()", "synchronize(")
_PACKAGE = Path(__file__).parents[1]
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')
_ESCAPE = re.compile(r"\\(?:x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


class StackFrame(NamedTuple):
    """One entry of a stack: the file, the line in it (0 where it is not known) and the function's name."""

    file: str
    line: int
    function: str


def where_is(thread: int) -> tuple[bool, str]:
    """Tell whether a thread waits for other ranks, and the call it is in with the line of this package that made it.

    The backward pass may run in a thread that Python does not know by name; then that one is looked at.
    """
    stacks = read_stacks()
    stack = stacks.get(thread)
    if not stack:
        return False, ""
    if "torch/autograd/" in stack[0].file:
        known = {found.ident for found in threading.enumerate()}
        stack = next((other for ident, other in stacks.items() if other and ident not in known), stack)
    waits = _is_wait(stack[0].file, stack[0].line)
    collective = ""
    for call in stack:
        inside = _in_package(call.file)
        if inside is not None:
            return waits, f"{collective or stack[0].function}, mm/{inside}:{call.line} ({call.function})"
        if "torch/distributed/" in call.file:
            waits, collective = True, collective or call.function  # what it calls in turn says less
    return waits, collective or stack[0].function


def read_stacks() -> dict[int, list[StackFrame]]:
    """The stacks of all threads, by `threading.get_ident`, each with the innermost call first.

    A stack ends after 100 calls, and there are 100 threads at most.
    """
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode("ascii", "replace")
    stacks: dict[int, list[StackFrame]] = {}
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            stacks[int(thread[1], 16)] = calls = []
        elif call := _FRAME.match(line):
            number = 0 if call[2] == "???" else int(call[2])
            calls.append(StackFrame(_unescaped(call[1]), number, _unescaped(call[3])))
    return stacks


@functools.lru_cache(maxsize=4096)
def _in_package(file: str) -> str | None:
    """A file's path inside this package; None for others. Kept, as a look asks for every call of a deep stack."""
    path = Path(file)
    return str(path.relative_to(_PACKAGE)) if path.is_relative_to(_PACKAGE) else None


@functools.lru_cache(maxsize=4096)
def _is_wait(file: str, line: int) -> bool:
    """Tell whether a line of source waits for others. Other lines of the file are not kept: torch's are megabytes."""
    kept = file in linecache.cache
    text = linecache.getline(file, line)
    if not kept:
        linecache.cache.pop(file, None)
    return any(word in text for word in _WAITS)


def _unescaped(text: str) -> str:
    """`faulthandler` writes letters beyond ASCII as numbers."""
    return _ESCAPE.sub(lambda found: chr(int(found[0][2:], 16)), text) if "\\" in text else text
