"""Media in object storage, named one by one: each is fetched when it is read, into the cache that all share.

A copy's name says address, tag and size of the object as it was listed, so that an object which was replaced is another
file. Whoever reads a copy must expect that the cache drops it for others; `reading` fetches it again then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TypeVar

from mm.config.storage import Remote, Storage, location_of
from mm.data.remote.cache import cache_of, key_of
from mm.data.remote.client import MissingObjectError, attempt
from mm.data.remote.reading import download
from mm.errors import ConfigError, DataError, Problem, raise_all

T = TypeVar("T")

PROTOCOLS = ("s3://", "s3a://", "gs://")
_TRIES = 3


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """An object as it was when it was listed.

    Attributes:
        place: it. version: its tag and size.
    """

    place: Remote
    version: str

    @property
    def copy(self) -> Path:
        """Name of its copy on the local disk, with the object's ending; the copy need not be there."""
        return cache_of(self.place.storage).path(self._key)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when the object does, wherever it lies."""
        return sha256(self.version.encode()).hexdigest()[:16]

    @property
    def _key(self) -> str:
        ending = PurePosixPath(self.place.name).suffix
        return key_of(self.place.storage.endpoint_url, self.place.url, self.version) + ending

    def fetch(self) -> None:
        """Have the copy on the disk.

        Raises:
            DataError: DATA-001 where the object has gone, DATA-262 where it is another by now, DATA-018 and DATA-019
                where the disk refuses; what `mm.data.remote.client.attempt` raises.
        """
        cache, key = cache_of(self.place.storage), self._key
        found = cache.get(key)
        if found is not None:
            found.close()
            return
        with cache.writing() as temporary:
            try:
                download(self.place, temporary)
                now = _version(self.place)
            except MissingObjectError:
                raise _missing(self.place, str(self.place)) from None
            if now != self.version:
                message = f"{self.place} is another object than when it was listed."
                raise DataError("DATA-262", message, "Start again when the bucket no longer changes.")
            cache.keep(key, temporary).close()


def is_object(path: str) -> bool:
    """Tell whether a path of a table is the address of an object."""
    return path.lower().startswith(PROTOCOLS)


def find_object(address: str, storage: Storage, place: str) -> RemoteFile:
    """The object of an address, as it is now.

    Args:
        address: it. storage: how it is read. place: what names it, for messages.

    Raises:
        DataError: DATA-063 for an address without a bucket, DATA-001 for an object that is not there; what
            `mm.data.remote.client.attempt` raises.
    """
    try:
        found = location_of(address, storage)
    except ConfigError as error:
        raise DataError("DATA-063", f"{place}: {error.problems[0].message}", error.problems[0].remedy) from None
    assert isinstance(found, Remote)  # noqa: S101  of these protocols
    try:
        return RemoteFile(found, _version(found))
    except MissingObjectError:
        raise _missing(found, place) from None


def reading(objects: Iterable[RemoteFile], read: Callable[[], T]) -> T:
    """Read local copies of objects, which are fetched before, and again where the cache drops one meanwhile.

    Raises:
        DataError: DATA-263 where the cache keeps dropping them, what `RemoteFile.fetch` and `read` raise, which then
            speaks of the objects and not of their copies.
    """
    wanted = tuple(objects)
    for _ in range(_TRIES):
        for one in wanted:
            one.fetch()
        try:
            return read()
        except DataError as error:
            if not wanted:
                raise
            if all(one.copy.exists() for one in wanted):
                raise_all(DataError, _of_objects(error, wanted))
    storage = wanted[0].place.storage
    message = f"{wanted[0].place} was fetched {_TRIES} times, and the cache dropped it each time before it was read."
    remedy = f"Raise data.storage.cache_gigabytes, now {storage.cache_gigabytes:g}: it must hold what all readers read."
    raise DataError("DATA-263", message, remedy)


def _version(place: Remote) -> str:
    about = attempt(place, lambda client: client.info(place.url))
    if about.get("type") == "directory":
        raise MissingObjectError(f"{place} is no object")
    return f"{about.get('ETag') or about.get('mtime') or about.get('LastModified')} {about['size']}"


def _missing(place: Remote, named: str) -> DataError:
    found = "" if named == str(place) else f"{named}: "
    return DataError("DATA-001", f"{found}{place} does not exist.", "Correct the address or add the object.")


def _of_objects(error: DataError, objects: Iterable[RemoteFile]) -> list[Problem]:
    """Problems of an error, with the names of objects where they have those of copies."""
    found = list(error.problems)
    for one in objects:
        copy = str(one.copy)
        found = [Problem(p.id, p.message.replace(copy, str(one.place)), p.remedy) for p in found]
    return found
