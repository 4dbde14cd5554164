"""Table: a file of named numpy columns that is memory-mapped, with a checksum of itself.

bytes 0..7    magic "MMTABLE1"
8..23         checksum, 16 bytes, of all that follows
24..31        length of the header, unsigned, little-endian
32..          header, JSON: {"version", "checksum", "kind", "about", "columns": {name: [dtype, shape, offset]}}
then          the columns, each contiguous, little-endian, at offsets (from the file's begin) that 64 divides

"checksum" names the hash (`mm.data.store.checksum.KINDS`) of the table, and of the blobs that a shard's index places.
Tables of version 1 do not name it: it is blake2b. Tables of all versions may be in one store; the last is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mm.config.storage import Location
from mm.data.files import write_atomically
from mm.data.remote.reading import open_whole, version_of
from mm.data.store.checksum import DIGEST_BYTES, KINDS, Checksum, checksum_of
from mm.data.store.checksum import KIND as CHECKSUM
from mm.errors import DataError

MAGIC = b"MMTABLE1"
VERSION = 2
ALIGNMENT = 64
NO_DAMAGE = frozenset(["DATA-072", "DATA-158"])
"""Errors of reading after which what is there may be whole: this machine, or this program, cannot tell."""

_BEGIN = len(MAGIC) + DIGEST_BYTES  # of what the checksum is of
_PREFIX = _BEGIN + 8
_MAX_HEADER_BYTES = 64 * 2**20
_CHUNK = 2**20
# the last of a dtype, by numpy
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, SyntaxError)
_LOOK = "Check its permissions and the disk it is on."

Column = NDArray[Any]


@dataclass(frozen=True)
class TableHeader:
    """Header of a table: its kind's facts, the checksum that it claims, the places of its columns, the file's size."""

    about: Mapping[str, Any]
    checksum: Checksum
    columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    size: int


@dataclass(frozen=True)
class Table:
    """An open table: its header and its columns, mapped."""

    header: TableHeader
    columns: Mapping[str, Column]


class _LaterVersionError(Exception):
    """A table of a version that this program does not know."""


def aligned(size: int) -> int:
    """The size, rounded up to what blobs and columns are aligned to."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_table(path: Path, kind: str, about: Mapping[str, Any], columns: Mapping[str, Column]) -> bytes:
    """Write a table in one step; returns its checksum. Raises what `mm.data.files.write_atomically` raises."""
    offset = 0
    places = {}
    for name, column in columns.items():
        places[name] = [_described(column.dtype), list(column.shape), offset]
        offset = aligned(offset + column.nbytes)
    header = _header(kind, about, places, 0)
    begin = aligned(_PREFIX + len(header) + 24 * len(columns))  # offsets grow by some digits when they count from here
    header = _header(kind, about, places, begin)
    header += b" " * (begin - _PREFIX - len(header))
    parts = [len(header).to_bytes(8, "little"), header]
    for column in columns.values():
        content = np.ascontiguousarray(column).tobytes()
        parts += [content, b"\0" * (aligned(len(content)) - len(content))]
    checksum = checksum_of(parts).value
    write_atomically(path, [MAGIC, checksum, *parts], _BEGIN + sum(map(len, parts)))
    return checksum


def read_table_header(path: Location, kind: str, remedy: str) -> TableHeader:
    """Read the header of a table, and nothing of its columns where it is local.

    Args:
        path: the file. kind: what it must be. remedy: what to do when it is not.

    Raises:
        DataError: DATA-150 when it is missing, cut off or no such table, DATA-158 when it is of a later version,
            DATA-072 when it cannot be read; of object storage what `mm.data.remote.client.attempt` raises.
    """
    with _opened(path, kind, remedy, None) as (_, header):
        return header


@contextmanager
def _opened(path: Location, kind: str, remedy: str, value: bytes | None) -> Iterator[tuple[BinaryIO, TableHeader]]:
    """A table, open, with its header; a remote one is the copy in the cache."""
    try:
        version = value.hex() if value is not None else version_of(path)
        stream = open_whole(path, version, lambda content: _is_whole(content, kind, value))
    except FileNotFoundError:
        raise DataError("DATA-150", f"{path} does not exist.", remedy) from None
    except OSError as error:
        raise DataError("DATA-072", f"{path} cannot be read ({error}).", _LOOK) from None
    with stream:
        try:
            header = _read_header(stream, kind)
        except OSError as error:
            raise DataError("DATA-072", f"{path} cannot be read ({error}).", _LOOK) from None
        except _LaterVersionError as error:
            raise DataError("DATA-158", f"{path} is {error}.", "Use a later version of mm.") from None
        except _DAMAGED as error:
            raise DataError("DATA-150", f"{path} is no whole {kind} ({error}).", remedy) from None
        yield stream, header


def _read_header(stream: BinaryIO, kind: str) -> TableHeader:
    size = stream.seek(0, 2)
    stream.seek(0)
    prefix = stream.read(_PREFIX)
    if len(prefix) < _PREFIX or not prefix.startswith(MAGIC):
        raise ValueError("it does not begin as one")
    length = int.from_bytes(prefix[-8:], "little")
    if not 0 < length <= min(_MAX_HEADER_BYTES, size - _PREFIX):
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    return _parsed(json.loads(stream.read(length)), prefix[len(MAGIC) : _BEGIN], stream, kind)


def _is_whole(content: bytes | memoryview, kind: str, value: bytes | None) -> bool:
    """Tell whether a table's bytes have the checksum that they say, and the one that is asked for."""
    try:
        said = _read_header(BytesIO(content), kind).checksum
    except (*_DAMAGED, _LaterVersionError):
        return False
    return value in (None, said.value) and said.fits(memoryview(content)[_BEGIN:])


def open_table(path: Location, kind: str, remedy: str, digest: bytes | None = None) -> Table:
    """Map a table, having compared its checksum with its content; of the content nothing stays in memory.

    Args:
        path, kind, remedy: as in `read_table_header`. digest: that it must have, when known.

    Raises:
        DataError: what `read_table_header` raises, DATA-150 when the checksum is not its own, or not `digest`.
    """
    with _opened(path, kind, remedy, digest) as (stream, header):
        said = header.checksum
        if digest not in (None, said.value):
            message = f"{path} is not the one that the store was finished with (its checksum is {said.value.hex()}"
            raise DataError("DATA-150", f"{message}, expected {digest.hex()}).", remedy)
        found = _content_checksum(stream, said.kind)
        if found != said:
            message = f"{path} is damaged: its content has the checksum {found}, it says {said}."
            raise DataError("DATA-150", message, remedy)
        whole = np.memmap(stream, dtype=np.uint8, mode="r")
    columns = {}
    for name, (dtype, shape, offset) in header.columns.items():
        flat = np.asarray(whole)[offset : offset + prod(shape) * dtype.itemsize]
        columns[name] = flat.view(dtype).reshape(shape)
    return Table(header, columns)


def _content_checksum(stream: BinaryIO, kind: str) -> Checksum:
    stream.seek(_BEGIN)
    return checksum_of(iter(lambda: stream.read(_CHUNK), b""), kind)


def _header(kind: str, about: Mapping[str, Any], places: Mapping[str, list[Any]], begin: int) -> bytes:
    columns = {name: [dtype, shape, begin + offset] for name, (dtype, shape, offset) in places.items()}
    said = {"version": VERSION, "checksum": CHECKSUM, "kind": kind, "about": about, "columns": columns}
    return json.dumps(said).encode()


def _described(dtype: np.dtype[Any]) -> Any:
    return dtype.str if dtype.names is None else dtype.descr


def _dtype(described: Any) -> np.dtype[Any]:
    try:
        if isinstance(described, str):
            return np.dtype(described)
        return np.dtype([(name, kind, *map(tuple, shape)) for name, kind, *shape in described])
    except SyntaxError as error:  # numpy reads such texts as Python
        raise ValueError(f"{described!r:.80} is no type") from error


def _parsed(values: Any, value: bytes, stream: BinaryIO, kind: str) -> TableHeader:
    version, found, size = values["version"], values["kind"], stream.seek(0, 2)
    name = "blake2b" if version == 1 else values["checksum"]
    if isinstance(version, int) and version > VERSION:
        if name in KINDS and _content_checksum(stream, name).value != value:
            raise ValueError("its content has another checksum than it says")
        raise _LaterVersionError(f"a {found} of version {version}, and this program reads versions 1 to {VERSION}")
    if version not in range(1, VERSION + 1) or found != kind or name not in KINDS:
        raise ValueError(f"it says version {version} of {found} with {name}, expected {VERSION} of {kind}")
    columns = {}
    for column, (described, shape, offset) in values["columns"].items():
        dtype, sizes = _dtype(described), tuple(int(length) for length in shape)
        if dtype.hasobject or min((*sizes, offset)) < 0 or offset + prod(sizes) * dtype.itemsize > size:
            raise ValueError(f"its column {column} does not fit into {size} bytes")
        columns[column] = (dtype, sizes, int(offset))
    return TableHeader(values["about"], Checksum(name, value), columns, size)
