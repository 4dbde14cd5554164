"""Importing libraries for seconds, and no longer than that takes."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import what stays to the end without looking for garbage in it.

    torch and megatron-core make half a million objects, and the collector would go through all each time that they have
    grown by a quarter. It leaves them out of later collections, too, so that processes that are forked from this one
    share their memory, until the interpreter ends: triton complains of each that is then not released.
    """
    known = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:  # else there is nothing new, and garbage of the caller would be kept
            gc.freeze()
            atexit.register(gc.unfreeze)
        gc.enable()
