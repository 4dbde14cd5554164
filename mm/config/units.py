"""Bytes in words. All that the program prints is in powers of 1024, with their own names: KiB, MiB, GiB."""

from __future__ import annotations

import re

GIB = 2**30

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def format_bytes(num_bytes: float) -> str:
    """`1.50 GiB`, `20.00 MiB`, `512 bytes`: in the largest unit of which there is one."""
    value = float(num_bytes)
    for unit in _UNITS:
        if abs(value) < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.2f} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def in_gib(num_bytes: float, digits: int = 2) -> str:
    """The number of GiB alone, for columns and sums of which a reader compares the parts."""
    return f"{num_bytes / GIB:.{digits}f}"


_SIZES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes that a text says: `20GB` is 20 times 10^9, `1.5 TiB` 1.5 times 2^40, `512B` 512.

    Raises:
        ValueError: it is no number with such a unit.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kMGT]|[KMGT]i)?B", text)
    if found is None:
        raise ValueError(f"{text!r} is no size")
    return int(float(found[1]) * _SIZES[found[2] or ""])
