"""Table: a file of named numpy columns that is memory-mapped, with a checksum of itself.

bytes 0..7    magic "MMTABLE1"
8..23         blake2b, 16 bytes, of all that follows
24..31        length of the header, unsigned, little-endian
32..          header, JSON: {"version", "kind", "about", "columns": {name: [dtype, shape, offset]}}
then          the columns, each contiguous, little-endian, at offsets (from the file's begin) that 64 divides
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mm.config.storage import Location
from mm.data.files import write_atomically
from mm.data.remote.reading import open_whole, version_of
from mm.errors import DataError

MAGIC = b"MMTABLE1"
VERSION = 1
ALIGNMENT = 64
DIGEST_BYTES = 16

_PREFIX = len(MAGIC) + DIGEST_BYTES + 8
_MAX_HEADER_BYTES = 64 * 2**20
_CHUNK = 2**20
# the last of a dtype, by numpy
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, SyntaxError)
_LOOK = "Check its permissions and the disk it is on."

Column = NDArray[Any]


@dataclass(frozen=True)
class TableHeader:
    """Header of a table: its kind's facts, the digest that it claims, the places of its columns, the file's size."""

    about: Mapping[str, Any]
    digest: bytes
    columns: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]]
    size: int


@dataclass(frozen=True)
class Table:
    """An open table: its header and its columns, mapped."""

    header: TableHeader
    columns: Mapping[str, Column]


def digest_of(content: bytes) -> bytes:
    """The 16 bytes of blake2b by which blobs and tables are told to be whole."""
    return blake2b(content, digest_size=DIGEST_BYTES).digest()


def aligned(size: int) -> int:
    """The size, rounded up to what blobs and columns are aligned to."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_table(path: Path, kind: str, about: Mapping[str, Any], columns: Mapping[str, Column]) -> bytes:
    """Write a table in one step; returns its digest. Raises what `mm.data.files.write_atomically` raises."""
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
    hasher = blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        hasher.update(part)
    digest = hasher.digest()
    write_atomically(path, [MAGIC, digest, *parts], _PREFIX - 8 + sum(map(len, parts)))
    return digest


def read_table_header(path: Location, kind: str, remedy: str) -> TableHeader:
    """Read the header of a table, and nothing of its columns where it is local.

    Args:
        path: the file. kind: what it must be. remedy: what to do when it is not.

    Raises:
        DataError: DATA-150 when it is missing, cut off or no such table, DATA-072 when it cannot be read; of object
            storage what `mm.data.remote.client.attempt` raises.
    """
    with _opened(path, kind, remedy, None) as (_, header):
        return header


@contextmanager
def _opened(path: Location, kind: str, remedy: str, digest: bytes | None) -> Iterator[tuple[BinaryIO, TableHeader]]:
    """A table, open, with its header; a remote one is the copy in the cache."""
    try:
        version = digest.hex() if digest is not None else version_of(path)
        stream = open_whole(path, version, lambda content: _is_whole(content, digest))
    except FileNotFoundError:
        raise DataError("DATA-150", f"{path} does not exist.", remedy) from None
    except OSError as error:
        raise DataError("DATA-072", f"{path} cannot be read ({error}).", _LOOK) from None
    with stream:
        try:
            header = _read_header(stream, kind)
        except OSError as error:
            raise DataError("DATA-072", f"{path} cannot be read ({error}).", _LOOK) from None
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
    return _parsed(stream.read(length), prefix[len(MAGIC) : len(MAGIC) + DIGEST_BYTES], size, kind)


def _is_whole(content: bytes, digest: bytes | None) -> bool:
    """Tell whether a table's bytes have the digest that they say, and the one that is asked for."""
    said = content[len(MAGIC) : len(MAGIC) + DIGEST_BYTES]
    return said == digest_of(content[len(MAGIC) + DIGEST_BYTES :]) and digest in (None, said)


def open_table(path: Location, kind: str, remedy: str, digest: bytes | None = None) -> Table:
    """Map a table, having compared its checksum with its content; of the content nothing stays in memory.

    Args:
        path, kind, remedy: as in `read_table_header`. digest: that it must have, when known.

    Raises:
        DataError: what `read_table_header` raises, DATA-150 when the checksum is not its own, or not `digest`.
    """
    with _opened(path, kind, remedy, digest) as (stream, header):
        if digest is not None and header.digest != digest:
            message = f"{path} is not the one that the store was finished with (its checksum is {header.digest.hex()}"
            raise DataError("DATA-150", f"{message}, expected {digest.hex()}).", remedy)
        found = _content_digest(stream)
        if found != header.digest:
            message = f"{path} is damaged: its content has the checksum {found.hex()}, it says {header.digest.hex()}."
            raise DataError("DATA-150", message, remedy)
        whole = np.memmap(stream, dtype=np.uint8, mode="r")
    columns = {}
    for name, (dtype, shape, offset) in header.columns.items():
        flat = np.asarray(whole)[offset : offset + prod(shape) * dtype.itemsize]
        columns[name] = flat.view(dtype).reshape(shape)
    return Table(header, columns)


def _content_digest(stream: BinaryIO) -> bytes:
    hasher = blake2b(digest_size=DIGEST_BYTES)
    stream.seek(len(MAGIC) + DIGEST_BYTES)
    while chunk := stream.read(_CHUNK):
        hasher.update(chunk)
    return hasher.digest()


def _header(kind: str, about: Mapping[str, Any], places: Mapping[str, list[Any]], begin: int) -> bytes:
    columns = {name: [dtype, shape, begin + offset] for name, (dtype, shape, offset) in places.items()}
    return json.dumps({"version": VERSION, "kind": kind, "about": about, "columns": columns}).encode()


def _described(dtype: np.dtype[Any]) -> Any:
    return dtype.str if dtype.names is None else dtype.descr


def _dtype(described: Any) -> np.dtype[Any]:
    try:
        if isinstance(described, str):
            return np.dtype(described)
        return np.dtype([(name, kind, *map(tuple, shape)) for name, kind, *shape in described])
    except SyntaxError as error:  # numpy reads such texts as Python
        raise ValueError(f"{described!r:.80} is no type") from error


def _parsed(content: bytes, digest: bytes, size: int, kind: str) -> TableHeader:
    values = json.loads(content)
    if values["version"] != VERSION or values["kind"] != kind:
        raise ValueError(f"it says version {values['version']} of {values['kind']}, expected {VERSION} of {kind}")
    columns = {}
    for name, (described, shape, offset) in values["columns"].items():
        dtype, sizes = _dtype(described), tuple(int(length) for length in shape)
        if dtype.hasobject or min((*sizes, offset)) < 0 or offset + prod(sizes) * dtype.itemsize > size:
            raise ValueError(f"its column {name} does not fit into {size} bytes")
        columns[name] = (dtype, sizes, int(offset))
    return TableHeader(values["about"], digest, columns, size)
