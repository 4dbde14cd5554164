"""Reads of places, local and remote alike. Missing files are `FileNotFoundError`s of both."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import partial
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mm.config.base import SectionT, parse, parse_json
from mm.config.base import load as load_local
from mm.config.storage import Location, Remote
from mm.data.files import write_error
from mm.data.remote.cache import cache_of, key_of
from mm.data.remote.client import MissingObjectError, attempt
from mm.errors import ConfigError, DataError

IsWhole = Callable[[bytes | memoryview], bool]


def exists(place: Location) -> bool:
    """Test that a file or an object is there; raises what `attempt` raises of storage."""
    if isinstance(place, Path):
        return place.exists()
    try:
        attempt(place, lambda client: client.info(place.url))
    except MissingObjectError:
        return False
    return True


def names_in(place: Location) -> list[str]:
    """Names in a folder, in no order; none where it is not there. Raises what `attempt` raises of storage."""
    if isinstance(place, Path):
        return os.listdir(place) if place.is_dir() else []
    try:
        found = attempt(place, lambda client: client.ls(place.url, detail=False))
    except MissingObjectError:
        return []
    return [str(path).rstrip("/").rpartition("/")[2] for path in found]


def read_bytes(place: Location) -> bytes:
    """A small file, whole, as it is now.

    Raises:
        OSError: it is not there, or cannot be read. DataError: what `attempt` raises.
    """
    if isinstance(place, Path):
        return place.read_bytes()
    content: bytes = attempt(place, lambda client: client.cat_file(place.url))
    return content


def open_lines(place: Location) -> BinaryIO:
    """A file that is read line by line, open; raises what `read_bytes` raises."""
    return open(place, "rb") if isinstance(place, Path) else io.BytesIO(read_bytes(place))


def load_section(section: type[SectionT], place: Location) -> SectionT:
    """A section from a JSON file; raises what `mm.config.base.load` raises, and of storage what `attempt` raises."""
    if isinstance(place, Path):
        return load_local(section, place)
    try:
        text = read_bytes(place).decode("utf-8-sig")
    except (MissingObjectError, UnicodeDecodeError) as error:
        found = "it does not exist" if isinstance(error, MissingObjectError) else str(error)
        raise ConfigError("CFG-001", f"{place} cannot be read ({found}).", "Correct the address.") from None
    return parse(section, parse_json(text, str(place)), str(place))


def open_whole(place: Location, key: str, is_whole: IsWhole) -> BinaryIO:
    """A file, open; of a remote one the copy in the cache.

    Args:
        place: it. key: what tells its content from all others of that place; `version_of` where nothing else does.
        is_whole: tells whether a remote content is as it must be. One that is not comes too, and is not kept.

    Raises:
        OSError: it is not there, or cannot be read. DataError: what `attempt` and the cache raise.
    """
    if isinstance(place, Path):
        return open(place, "rb")
    cache, name = cache_of(place.storage), key_of(place.storage.endpoint_url, place.url, key)
    found = cache.get(name)
    if found is not None:
        if is_whole(found.read()):
            found.seek(0)
            return found
        found.close()
        cache.drop(name)
    content, whole = _fetched(place, lambda client: client.cat_file(place.url), is_whole)
    return cache.put(name, content) if whole else io.BytesIO(content)


def version_of(place: Location) -> str:
    """Tag of a remote object's content, as its storage tells it."""
    if isinstance(place, Path):
        return ""
    about = attempt(place, lambda client: client.info(place.url))
    return str(about.get("ETag") or (about.get("size"), about.get("mtime"), about.get("LastModified")))


def read_up_to(stream: FileIO | BufferedReader, length: int) -> memoryview:
    """So many bytes of an open file, or as many as there are, in memory that is the caller's to write to."""
    content, end = np.empty(length, np.uint8).data, 0
    while end < length and (count := stream.readinto(content[end:])):
        end += count
    return content[:end]


def read_range(place: Remote, offset: int, length: int, key: str, is_whole: IsWhole) -> tuple[memoryview, bool]:
    """Some bytes of an object, through the cache, and whether they are whole; fewer where it ends before.

    Args:
        place, key, is_whole: as in `open_whole`. offset, length: which bytes.

    Raises:
        MissingObjectError: there is no such object. DataError: what `attempt` and the cache raise.
    """
    cache, name = cache_of(place.storage), key_of(place.storage.endpoint_url, place.url, offset, length, key)
    found = cache.get(name)
    if found is not None:
        with found:
            kept = read_up_to(found, length)
        if is_whole(kept):
            return kept, True
        cache.drop(name)

    def read(client: Any) -> bytes:
        try:
            part: bytes = client.cat_file(place.url, start=offset, end=offset + length)
        except OSError as error:
            if not _begins_after_the_end(error):
                raise
            part = b""
        if len(part) < length and int(client.info(place.url)["size"]) >= offset + length:
            raise EOFError(f"an answer of {len(part)} of {length} bytes")
        return part

    content, whole = _fetched(place, read, is_whole)
    if whole:
        cache.put(name, content).close()
    return memoryview(bytearray(content)), whole


def _fetched(place: Remote, read: Callable[[Any], bytes], is_whole: IsWhole) -> tuple[bytes, bool]:
    """A content and whether it is whole; fetched again where it is not, since the way may be damaged and not it."""
    content = attempt(place, read)
    if not is_whole(content):
        content = attempt(place, read)
        return content, is_whole(content)
    return content, True


def _begins_after_the_end(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, dict) and response.get("Error", {}).get("Code") in ("InvalidRange", "416")


def download(place: Remote, target: Path) -> None:
    """Copy an object into a new local file, a part at a time.

    Raises:
        MissingObjectError: there is no such object. DataError: what `attempt` raises, DATA-018 and DATA-019 where the
            disk refuses.
    """
    size = int(attempt(place, lambda client: client.info(place.url))["size"])
    try:
        with open(target, "wb") as file:
            for offset in range(0, size, _PART):
                end = min(size, offset + _PART)
                file.write(attempt(place, partial(_part, place=place, begin=offset, end=end)))
    except MissingObjectError:
        raise
    except OSError as error:
        raise write_error(target, size, error) from error


_PART = 64 * 2**20


def _part(client: Any, *, place: Remote, begin: int, end: int) -> bytes:
    content: bytes = client.cat_file(place.url, start=begin, end=end)
    if len(content) != end - begin:
        raise EOFError(f"an answer of {len(content)} of {end - begin} bytes")
    return content


def require_bucket(place: Location) -> None:
    """Refuse a place in a bucket that is not there, where the storage tells.

    Raises:
        DataError: DATA-183.
    """
    if isinstance(place, Path):
        return
    try:
        names_in(place)
    except DataError as error:
        if error.id == "DATA-183":
            raise
