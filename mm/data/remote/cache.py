"""A folder that keeps what was read from object storage, by keys that say the content: many processes may share it.

Nothing of it is trusted: whoever reads a file compares it with what it must be, and drops it if it differs. A file is
written under a temporary name and renamed. Its time of modification is that of its last use.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from mm.config.storage import Storage
from mm.data.files import TEMPORARY_PREFIX, make_folder, write_error

_SHARE_BETWEEN_SWEEPS = 16
_SECONDS_OF_A_TEMPORARY = 3600.0
_LETTERS_OF_A_FOLDER = 2


class Cache:
    """Contents that were read: at most `most_bytes` and a sixteenth, beside what is being written."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder
        self._most_bytes = most_bytes

    def get(self, key: str) -> BufferedReader | None:
        """The file of a key, open; None where it is not there, or cannot be read, which writing it will tell."""
        path = self.path(key)
        try:
            stream = open(path, "rb")  # noqa: SIM115  the caller closes it
        except OSError:
            return None
        with suppress(OSError):  # another process may have removed it by now
            os.utime(path)
        return stream

    def drop(self, key: str) -> None:
        """Remove the file of a key, which is damaged."""
        self.path(key).unlink(missing_ok=True)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A temporary file in the cache, to be written and given to `keep`; what is left of it goes.

        Raises:
            DataError: DATA-018 where the folder cannot be made.
        """
        make_folder(self.folder, "storage.cache")
        temporary = self.folder / f"{TEMPORARY_PREFIX}{uuid4().hex}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def keep(self, key: str, temporary: Path) -> BinaryIO:
        """Give a written file its name, and remove what was used longest ago where there is too much; returns it open.

        Raises:
            DataError: DATA-018 or DATA-019 where the disk refuses.
        """
        path = self.path(key)
        stream = open(temporary, "rb")  # noqa: SIM115  the caller closes it; before others can remove the file
        try:
            size = os.fstat(stream.fileno()).st_size
            make_folder(path.parent, "storage.cache")
            os.replace(temporary, path)
            self._note(size)
        except OSError as error:
            stream.close()
            raise write_error(path, size, error) from error
        except BaseException:
            stream.close()
            raise
        return stream

    def put(self, key: str, content: bytes) -> BinaryIO:
        """Keep some bytes; raises what `writing` and `keep` raise."""
        with self.writing() as temporary:
            try:
                temporary.write_bytes(content)
            except OSError as error:
                raise write_error(self.path(key), len(content), error) from error
            return self.keep(key, temporary)

    def path(self, key: str) -> Path:
        """Name of the file of a key, whether it is there or not."""
        return self.folder / key[:_LETTERS_OF_A_FOLDER] / key

    def _note(self, size: int) -> None:
        """Count what all processes have written since the last sweep, and sweep where it is enough."""
        descriptor = os.open(self.folder / "written", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.read(descriptor, 32).decode(errors="replace").strip()
            written = (int(text) if text.isdecimal() else self._most_bytes) + size
            if written > self._most_bytes // _SHARE_BETWEEN_SWEEPS:
                self._sweep()
                written = 0
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(written).encode(), 0)
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what was used longest ago until the rest fits, and what killed processes left."""
        found: list[tuple[float, int, str]] = []
        for folder in os.scandir(self.folder):
            if folder.name.startswith(TEMPORARY_PREFIX):
                with suppress(FileNotFoundError):
                    if time.time() - folder.stat().st_mtime > _SECONDS_OF_A_TEMPORARY:
                        _remove(folder)
            elif folder.is_dir() and len(folder.name) == _LETTERS_OF_A_FOLDER:
                for entry in os.scandir(folder.path):
                    with suppress(FileNotFoundError):
                        status = entry.stat()
                        found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._most_bytes:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        os.unlink(entry.path)


def cache_of(storage: Storage) -> Cache:
    """The cache that a section names."""
    folder = Path(storage.cache) if storage.cache is not None else default_folder()
    return Cache(folder, round(storage.cache_gigabytes * 10**9))


def default_folder() -> Path:
    """The folder of the cache where none is said: in `XDG_CACHE_HOME`, or `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "mm-wan" / "storage"


def key_of(*words: object) -> str:
    """Key of a content, by what tells it from all others."""
    return blake2b("\0".join(map(str, words)).encode(), digest_size=20).hexdigest()
