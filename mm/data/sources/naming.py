"""Ids of samples: names of their files, with what tells rows of one file apart, found for any number of rows.

A row is kept as three hashes of 8 bytes, so that ten million of them are 240 MB. Rows whose hashes are equal are taken
for equal; of ten million different rows any two have equal ones with a probability of 3 in a million.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from mm.data.features import text_hash
from mm.data.sources.base import RowKey

WHOLE = "0-"
BY_NAME, BY_CUT, BY_CAPTION, LISTED_BEFORE = range(4)
"""Kinds of id; the last is of a row that says what one before it said."""


def sample_id(name: str, cut: str, captions: str, kind: int) -> str:
    """Id of a sample.

    Args:
        name: of its file, with the number of its data set before it. cut: as `Annotation.cut_name`.
        captions: as JSON. kind: what `RowNames` found.
    """
    return "//".join((name, cut, text_hash(captions))[: kind + 1])


class RowNames:
    """Names of the rows of some sources, in order.

    The first row of a file is called after it, another cut of it after file and cut, others after their captions as
    well; so that adding a row renames nothing.
    """

    def __init__(self) -> None:
        self._names = bytearray()
        self._cuts = bytearray()
        self._rows = bytearray()

    def __len__(self) -> int:
        return len(self._names) // 8

    def add(self, key: RowKey | None, source: int) -> None:
        """Take the next row; None for one that has no name."""
        if key is None:
            name = f"\0{len(self)}"
            key = RowKey(name, name, "", "")
        name = f"{source}:{key.name}" if source else key.name
        hashed = _hash(name)
        self._names += hashed
        self._cuts += hashed if key.cut == WHOLE else _hash(f"{name}\0{key.cut}")
        self._rows += _hash(f"{key.file}\0{key.cut}\0{key.rest}")

    def resolve(self) -> tuple[NDArray[np.uint8], dict[int, int]]:
        """The kind of each row's id, and for each row that was listed before the number of the first such row."""
        names, cuts, rows = (np.frombuffer(found, "<u8") for found in (self._names, self._cuts, self._rows))
        kinds = np.zeros(len(names), np.uint8)
        later = np.flatnonzero(~_is_first(names))
        kinds[later] = np.where(_is_first(cuts[later]), BY_CUT, BY_CAPTION)
        found, first = np.unique(rows, return_index=True)
        again = np.ones(len(rows), bool)
        again[first] = False
        kinds[again] = LISTED_BEFORE
        before = first[np.searchsorted(found, rows[again])]
        return kinds, dict(zip(np.flatnonzero(again).tolist(), before.tolist(), strict=True))


def _is_first(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """A mark for each value that is the first of its kind."""
    is_first = np.zeros(len(values), bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first


def _hash(words: str) -> bytes:
    return blake2b(words.encode(errors="surrogatepass"), digest_size=8).digest()
