"""Exceptions that say that memory ran out, and the bytes asked for: every kind of device has its own words."""

from __future__ import annotations

import re

import torch

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_ASKED = re.compile(rf"[Tt]ried to allocate (\d+(?:\.\d+)?) ({'|'.join(_UNITS)})")


def is_out_of_memory(error: BaseException, *, on_host: bool) -> bool:
    """Recognise an exception that says that the device has no room for an allocation.

    Args:
        error: any exception.
        on_host: whether the device is the CPU. Elsewhere a host without memory is another matter, which no flag about
            the device's memory mends.
    """
    if on_host:
        return isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error) and "memory: " in str(error)
        )
    # torch's own type comes from the caching allocator. What drivers and older torch_npu allocate fails with a plain
    # RuntimeError of these words.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error)
    )


def bytes_asked_for(error: BaseException) -> int | None:
    """Size of the allocation that failed; None where the exception does not say."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
