"""Media in object storage as a local folder: what lies below a prefix is downloaded once, before it is listed.

A folder of the cache has the paths of the bucket, so that whoever reads it from there reads local files. It is not
swept as what training reads is: clips are read once and in an order that no sweep knows. So a prefix that is larger
than the cache may be is refused before anything is downloaded.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm.config.storage import Remote
from mm.config.units import format_bytes
from mm.data.files import make_folder, path_below
from mm.data.remote.cache import cache_of, key_of
from mm.data.remote.client import MissingObjectError, attempt
from mm.data.remote.reading import download
from mm.data.remote.writing import new_file
from mm.errors import DataError

log = logging.getLogger(__name__)

_MEDIA = "media"


def local_copy(prefix: Remote, place: str) -> Path:
    """A local folder with all objects below a prefix. One process downloads, others of the node wait for it.

    Files that are there with the size and the tag of their objects are kept; those whose objects have gone are removed.

    Args:
        prefix: it. place: what names it, for messages.

    Raises:
        DataError: DATA-173 where nothing lies there, DATA-188 for more than the cache may hold, DATA-063 for an
            object whose name is no path, DATA-018 and DATA-019 where the disk refuses; what `attempt` raises.
    """
    objects = _objects(prefix)
    if not objects:
        raise DataError("DATA-173", f"{place}: nothing lies below {prefix}.", "Correct the bucket and the prefix.")
    total, most = sum(size for size, _ in objects.values()), prefix.storage.cache_gigabytes * 10**9
    if total > most:
        message = f"{place}: {len(objects)} objects below {prefix} are {format_bytes(total)}, and the cache may hold "
        remedy = "Raise data.storage.cache_gigabytes, on a disk that has the room, or name a part of them."
        raise DataError("DATA-188", f"{message}{format_bytes(int(most))}.", remedy)
    root = cache_of(prefix.storage).folder / _MEDIA / key_of(prefix.storage.endpoint_url, prefix.url)
    make_folder(root, "storage.cache")
    with _alone(root.with_suffix(".lock")):
        files = {path_below(root / "files", name, place): name for name in objects}
        for path in [path for path in (root / "files").rglob("*") if path.is_file() and path not in files]:
            path.unlink()
        missing = [name for path, name in files.items() if not _is_there(root, path, objects[name])]
        if missing:
            log.info("%s: %d of %d objects are downloaded from %s", place, len(missing), len(objects), prefix)
        for name in missing:
            _fetch(prefix, root, name, objects[name], place)
    return root / "files"


def _objects(prefix: Remote) -> dict[str, tuple[int, str]]:
    """Size and tag of each object below a prefix, by its path there."""
    try:
        found: dict[str, dict[str, Any]] = attempt(prefix, lambda client: client.find(prefix.url, detail=True))
    except MissingObjectError:
        return {}
    start = prefix.url.partition("://")[2] + "/"
    return {
        path.lstrip("/").removeprefix(start): (int(about["size"]), str(about.get("ETag") or about.get("LastModified")))
        for path, about in found.items()
        if about["type"] == "file" and not path.endswith("/")
    }


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tag(root: Path, name: str) -> Path:
    """File that says the tag of the object that a file was downloaded from."""
    return root / "tags" / key_of(name)


def _is_there(root: Path, path: Path, about: tuple[int, str]) -> bool:
    name = str(path.relative_to(root / "files"))
    try:
        return path.stat().st_size == about[0] and _tag(root, name).read_text() == about[1]
    except OSError:
        return False


def _fetch(prefix: Remote, root: Path, name: str, about: tuple[int, str], place: str) -> None:
    path = path_below(root / "files", name, place)
    try:
        with new_file(path) as temporary:
            download(prefix / name, temporary)
        with new_file(_tag(root, name)) as temporary:
            temporary.write_text(about[1])
    except MissingObjectError:
        message = f"{place}: {prefix / name} is gone since it was listed."
        raise DataError("DATA-001", message, "Start again when the bucket no longer changes.") from None
