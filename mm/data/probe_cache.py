"""A file that keeps numbers about other files, by their identity: SQLite, which survives kills and several writers.

A row is known by the file's path, size, time of change and inode, and by the versions of what reads it, so that a file
that was replaced, or another decoder, is asked anew. Rows carry a check of their own: a cache with any damage is made
anew, which costs time and no more.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import av
from PIL import __version__ as pillow_version

from mm.data.remote.media import RemoteFile
from mm.errors import DataError, DataWriteError

log = logging.getLogger(__name__)

_MADE_BY = f"1 av {av.__version__} pillow {pillow_version}"
_WAIT = 60.0  # seconds for another process to end its writing
_UNSAVED = 100  # rows, and
_UNSAVED_SECONDS = 5.0  # seconds after which what was found is forced to disk
_APPLICATION = 0x4D4D5043  # SQLite's mark of whose file it is
_TABLE = "CREATE TABLE IF NOT EXISTS facts (identity TEXT PRIMARY KEY, numbers TEXT, sum TEXT) WITHOUT ROWID"


def identity_of(file: Path) -> str | None:
    """A file as it is now, in 32 hexadecimal digits; None where it is not there."""
    try:
        now = file.stat()
    except OSError:
        return None
    words = (str(file.absolute()), str(now.st_size), str(now.st_mtime_ns), str(now.st_ino), _MADE_BY)
    return _digest("\0".join(words))


def identity_of_object(remote: RemoteFile) -> str:
    """An object as it was listed: its address, tag and size."""
    place = remote.place
    return _digest("\0".join((str(place.storage.endpoint_url), place.url, remote.version, _MADE_BY)))


class ProbeCache:
    """The numbers of files, kept in one file; without a path, forgotten at the end."""

    def __init__(self, path: Path | None) -> None:
        """Open or make it.

        Raises:
            DataError: DATA-018 where it cannot be opened or written, DATA-176 where the path is another file's.
        """
        self._path = path
        self._since = time.monotonic()
        self._unsaved: dict[str, str] = {}  # written together, so that no other process waits for a slow file
        try:
            is_another = path is not None and path.is_file() and path.stat().st_size and not _is_sqlite(path)
        except OSError as error:
            raise _unusable(path, error.strerror or error) from None
        if is_another:
            raise _of_another(path)
        self._connection = self._open()

    def __enter__(self) -> ProbeCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._save()
        self._connection.close()

    def get(self, identity: str) -> tuple[int, ...] | None:
        """The numbers of a file, or None. Raises DATA-018 where the cache cannot be read."""
        if identity in self._unsaved:
            return _numbers(self._unsaved[identity])
        try:
            row = self._connection.execute("SELECT numbers, sum FROM facts WHERE identity = ?", (identity,)).fetchone()
        except sqlite3.DatabaseError as error:
            self._recover(error)
            return None
        if row is None:
            return None
        text, check = row
        if check != _sum(identity, text):
            self._make_anew(f"the row of {identity} is damaged")
            return None
        return _numbers(text)

    def put(self, identity: str, numbers: Sequence[int]) -> None:
        """Keep the numbers of a file. Raises DATA-018 where the cache cannot be written."""
        self._unsaved[identity] = " ".join(map(str, numbers))
        if len(self._unsaved) >= _UNSAVED or time.monotonic() - self._since >= _UNSAVED_SECONDS:
            self._save()

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            self._refuse_what_is_no_damage(error)
            log.warning("%s is damaged (%s) and is made anew", self._path, error)
            self._remove()
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:" if self._path is None else self._path, timeout=_WAIT)
        # Another process may be making it: it marks the file before there is a table, so the table is looked for first.
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        if tables and owner != _APPLICATION and self._path is not None:
            connection.close()
            raise _of_another(self._path)
        with connection:
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(_TABLE)
        return connection

    def _save(self) -> None:
        rows = [(identity, text, _sum(identity, text)) for identity, text in self._unsaved.items()]
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", rows)
        except sqlite3.DatabaseError as error:
            self._recover(error)
        self._unsaved.clear()
        self._since = time.monotonic()

    def _recover(self, error: sqlite3.DatabaseError) -> None:
        self._refuse_what_is_no_damage(error)
        self._make_anew(str(error))

    def _make_anew(self, reason: str) -> None:
        log.warning("%s is damaged (%s) and is made anew", self._path, reason)
        self._connection.close()
        self._remove()
        self._connection = self._open()

    def _refuse_what_is_no_damage(self, error: sqlite3.DatabaseError) -> None:
        """Raise DATA-018 for a disk that is full, a lock that is kept, or what may not be written."""
        if isinstance(error, sqlite3.OperationalError):
            raise _unusable(self._path, error) from None

    def _remove(self) -> None:
        if self._path is not None:
            for ending in ("", "-journal"):
                Path(f"{self._path}{ending}").unlink(missing_ok=True)


def _unusable(path: Path | None, reason: object) -> DataWriteError:
    remedy = "Check the path, its permissions and the disk."
    return DataWriteError("DATA-018", f"{path} cannot be used: {reason}.", remedy)


def _of_another(path: Path | None) -> DataError:
    remedy = "Name a file that is not there, which is made; or delete this one."
    return DataError("DATA-176", f"{path} is no cache of sizes, and is left as it is.", remedy)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split())


def _sum(identity: str, text: str) -> str:
    return _digest(f"{identity} {text}")


def _is_sqlite(path: Path) -> bool:
    """Tell whether a file begins as SQLite's do: another one is not overwritten."""
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()
