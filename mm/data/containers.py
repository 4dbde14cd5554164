"""The number of bytes that a file says it has, where its container tells, so that one that is cut off is found."""

from __future__ import annotations

import struct
from pathlib import Path

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # RFC 8794, RFC 9559
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the file properties object
_FLV, _FLV_FILE = b"FLV", b"filesize\0"  # a number in the data that most writers put first
_HEAD_BYTES = 65536


def announced_bytes(file: Path) -> int | None:
    """Bytes that a Matroska, WebM, ASF or FLV file has when it is whole; None where it does not say, and for others."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    if head.startswith(_EBML):
        return _matroska_bytes(head)
    if head.startswith(_FLV) and (place := head.find(_FLV_FILE)) >= 0:
        number = head[place + len(_FLV_FILE) :][:8]
        return int(struct.unpack(">d", number)[0]) or None if len(number) == 8 else None
    if (place := head.find(_ASF_FILE)) >= 0:
        # after its identifier, its size and the file's identifier
        return int.from_bytes(head[place + 40 : place + 48], "little") or None
    return None


def _matroska_bytes(head: bytes) -> int | None:
    size, place = _ebml_number(head, len(_EBML))
    place += size or 0
    if head[place : place + 4] != _SEGMENT:
        return None
    size, place = _ebml_number(head, place + len(_SEGMENT))
    return None if size is None else place + size


def _ebml_number(data: bytes, place: int) -> tuple[int | None, int]:
    """A size and the place after it; None for one that was not known when it was written (all bits are set)."""
    length = 9 - data[place].bit_length() if place < len(data) and data[place] else 8
    value = int.from_bytes(data[place : place + length], "big") & ((1 << 7 * length) - 1)
    return (None if value == (1 << 7 * length) - 1 else value), place + length
