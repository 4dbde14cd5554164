"""Standard output and standard error that cannot end or hold up a run, and the log file that gets what is said there.

A terminal is closed, an ssh connection breaks, `| head` has seen enough, a disk is full: what is not read is left out.
The log file gets whole lines, without progress bars; processes of one job append to the same file.
"""

from __future__ import annotations

import errno
import faulthandler
import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeGuard

LOG_FILE = "MM_LOG_FILE"
"""Environment variable: the file that gets what a command and its processes say. The example scripts set it."""
PATIENCE_S = 5.0
"""How long a reader of standard error that takes nothing, such as a pager, holds up the run; then it misses lines."""
_PIECE = 4096  # a pipe that is ready takes that much without waiting (PIPE_BUF)
_NOBODY_READS = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.EBADF)


class LogFile:
    """A file that lines are appended to; where the disk refuses them, they are counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self.lost = 0
        self.refused: OSError | None = None

    def append(self, lines: str) -> None:
        """Write whole lines, in one piece: other processes write to the same file."""
        try:
            if self._file < 0:
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                faulthandler.enable(self._file)  # where a library crashes
            note = f"... {self.lost} lines are missing here: {self.refused}\n" if self.lost else ""
            data = (note + lines).encode(errors="backslashreplace")
            written = os.write(self._file, data)
            if written < len(data):
                os.write(self._file, data[written:])
            self.lost, self.refused = 0, None
        except OSError as error:
            self.lost += lines.count("\n")
            self.refused = error


class Console(io.TextIOBase):
    """One of the standard streams.

    Attributes:
        failed: why the stream refused something that somebody may still wait for: a full disk, not a closed pipe.
    """

    def __init__(self, stream: TextIO, log: LogFile | None, patience_s: float | None) -> None:
        """Take the place of a stream.

        Args:
            stream: the process's own.
            log: gets the same without bars.
            patience_s: how long to wait for a reader; None waits.
        """
        self._stream, self._log, self._patience_s = stream, log, patience_s
        self._file = stream.fileno()
        self._lock = threading.RLock()
        self._line, self._bar_is_last = "", False
        self._left_out = 0
        self._told_of_log = False
        self.failed: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return self._stream.encoding

    @property
    def buffer(self) -> Any:
        """The stream's, for bytes; they go past the log."""
        return self._stream.buffer

    def fileno(self) -> int:
        """The stream's, for what writes below Python; it goes past the log."""
        return self._file

    def isatty(self) -> bool:
        """True where a person looks at it."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """True, always."""
        return True

    def write(self, text: str) -> int:
        """Write to the stream and to the log file; nothing is raised."""
        # A thread that ends the process must come through, even where another one is stuck here.
        held = self._lock.acquire(timeout=2 * PATIENCE_S)
        try:
            self._show(text)
            if self._log is not None:
                self._note(self._log, text)
        finally:
            if held:
                self._lock.release()
        return len(text)

    def _show(self, text: str) -> None:
        data = text.encode(self.encoding, errors="backslashreplace")
        if self._left_out and self._is_ready(0.0):
            note, self._left_out = f"\n... {self._left_out} bytes are left out here, which nobody read\n", 0
            data = note.encode(self.encoding) + data
        for begin in range(0, len(data), _PIECE):
            piece = data[begin : begin + _PIECE]
            if self._is_ready(0.0 if self._left_out else self._patience_s):
                self._put(piece)
            else:
                self._left_out += len(piece)

    def _is_ready(self, patience_s: float | None) -> bool:
        if patience_s is None:
            return True
        try:
            poll = select.poll()
            poll.register(self._file, select.POLLOUT)
            return bool(poll.poll(1000 * patience_s))
        except OSError:
            return True  # writing tells why

    def _put(self, piece: bytes) -> None:
        while piece:
            try:
                piece = piece[os.write(self._file, piece) :]
            except BlockingIOError:  # somebody made the terminal or the pipe so
                if not self._is_ready(PATIENCE_S):
                    self._left_out += len(piece)
                    return
            except OSError as error:
                if error.errno not in _NOBODY_READS:
                    self.failed = error
                return

    def _note(self, log: LogFile, text: str) -> None:
        if text.startswith("\r") or (self._bar_is_last and text == "\n"):  # as tqdm writes its bars
            self._bar_is_last = text != "\n"
            return
        self._bar_is_last = False
        whole, newline, self._line = (self._line + text).replace("\r\n", "\n").replace("\r", " ").rpartition("\n")
        if newline:
            log.append(whole + newline)
        if log.refused is not None and not self._told_of_log:
            self._told_of_log = True
            self._show(f"The log file cannot be written ({log.refused}); the run goes on, lines are lost there.\n")


@contextmanager
def unbreakable_output() -> Iterator[list[Console]]:
    """Put `Console`s in the place of the process's standard streams; what took their place already stays.

    Yields:
        That of standard output, where it is the process's own.
    """
    log = LogFile(Path(os.environ[LOG_FILE])) if os.environ.get(LOG_FILE) else None
    before = sys.stdout, sys.stderr
    consoles = []
    if _is_own(before[0], sys.__stdout__):
        # A report waits for a reader who pages through it; a job, whose log is written, does not.
        consoles.append(Console(before[0], log, PATIENCE_S if log is not None else None))
        sys.stdout = consoles[0]
    if _is_own(before[1], sys.__stderr__):
        sys.stderr = Console(before[1], log, PATIENCE_S)
    try:
        yield consoles
    finally:
        sys.stdout, sys.stderr = before


def _is_own(stream: TextIO, original: TextIO | None) -> TypeGuard[TextIO]:
    """Recognise the stream that Python made, if it is open."""
    try:
        return stream is original and stream.fileno() >= 0
    except (OSError, ValueError, AttributeError):
        return False
