"""Checksums by which blobs and tables are told to be whole: against damage, not against anyone who means it.

What must tell two contents apart for good (keys of recipes and captions, ids of samples) has cryptographic hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from xxhash import xxh3_128

DIGEST_BYTES = 16
"""Of a checksum, and of the cryptographic digests that stand beside it."""


def _blake2b() -> Any:
    return blake2b(digest_size=DIGEST_BYTES)


KINDS: dict[str, Callable[[], Any]] = {"blake2b": _blake2b, "xxh3_128": xxh3_128}
"""Hashes of 16 bytes by name."""
KIND = "xxh3_128"
"""Of what is written: at the speed of memory, where blake2b took longer than all else of reading a sample."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """Checksum of some bytes: which hash, and its 16 bytes."""

    kind: str
    value: bytes

    def __str__(self) -> str:
        return f"{self.kind} {self.value.hex()}"

    def fits(self, content: bytes | memoryview) -> bool:
        """Tell whether it is that of a content."""
        return self.of_same_kind([content]) == self

    def of_same_kind(self, parts: Iterable[bytes | memoryview]) -> Checksum:
        """The checksum of another content by the same hash."""
        return checksum_of(parts, self.kind)


def checksum_of(parts: Iterable[bytes | memoryview], kind: str = KIND) -> Checksum:
    """Checksum of a content that comes in parts; `kind` is one of `KINDS`."""
    hasher = KINDS[kind]()
    for part in parts:
        hasher.update(part)
    return Checksum(kind, hasher.digest())
