"""Memory that two processes share: it has no name in any file system, so no folder for temporary files can be too full.

`multiprocessing`'s own goes to /dev/shm, which is small in containers, or to TMPDIR, as a file with holes: where a page
of it cannot be had later, the process that touches it is killed (SIGBUS) without a word.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any


class SharedMemory:
    """Bytes that this process and those it is sent to (as an argument of a new process) see alike.

    Attributes:
        bytes: the memory, writable.
    """

    def __init__(self, size: int) -> None:
        """Make `size` bytes, all zero and all there.

        Raises:
            OSError: there is not so much.
        """
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create("mm-shared", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                self._file = os.dup(file.fileno())
        try:
            os.posix_fallocate(self._file, 0, size)
            self.bytes = mmap.mmap(self._file, size)
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Give back the name; the memory goes with its last user."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (reduction.DupFd(self._file), len(self.bytes))


def _attached(file: Any, size: int) -> SharedMemory:
    memory = SharedMemory.__new__(SharedMemory)
    memory._file = file.detach()
    memory.bytes = mmap.mmap(memory._file, size)
    return memory
