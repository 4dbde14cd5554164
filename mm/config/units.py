"""Bytes in words. All that the program prints is in powers of 1024, with their own names: KiB, MiB, GiB."""

from __future__ import annotations

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
