"""Writes of places, local and remote alike: a file is there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from mm.config.storage import Location, Remote
from mm.data.files import TEMPORARY_PREFIX, make_folder, sync_folder, write_atomically, write_error
from mm.data.remote.cache import cache_of
from mm.data.remote.client import attempt


@contextmanager
def new_file(target: Location) -> Iterator[Path]:
    """A temporary local file, which becomes `target` where the block that writes it ends well.

    Raises:
        DataError: DATA-018 and DATA-019 where the disk refuses; of object storage what `attempt` raises.
    """
    with room_for(target) as folder:
        temporary = folder / f"{TEMPORARY_PREFIX}{target.name}-{uuid4().hex[:12]}"
        try:
            yield temporary
            deliver(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def room_for(target: Location) -> Iterator[Path]:
    """A local folder for what is to become `target`: its own, or a temporary one beside the cache.

    Raises:
        DataError: DATA-018 where it cannot be made.
    """
    if isinstance(target, Path):
        make_folder(target.parent, "the target")
        yield target.parent
        return
    cache = cache_of(target.storage).folder
    make_folder(cache, "storage.cache")
    with TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=cache) as folder:
        yield Path(folder)


def deliver(file: Path, target: Location) -> None:
    """Give a local file its place: by one rename, or by uploading it; raises what `new_file` raises."""
    if isinstance(target, Remote):
        attempt(target, partial(_upload, file=file, target=target))
        return
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(file, target)
        sync_folder(target.parent)
    except OSError as error:
        raise write_error(target, 0, error) from error


def write_bytes(target: Location, content: bytes) -> None:
    """Write a small file; raises what `new_file` raises."""
    if isinstance(target, Path):
        make_folder(target.parent, "the target")
        write_atomically(target, [content], len(content))
    else:
        attempt(target, lambda client: client.pipe_file(target.url, content))


def _upload(client: Any, *, file: Path, target: Remote) -> None:
    client.put_file(str(file), target.url)
    size, found = file.stat().st_size, int(client.info(target.url)["size"])
    if found != size:
        raise EOFError(f"{found} of {size} bytes arrived")
