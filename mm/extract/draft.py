"""Writing of a plan: all rows are gone through once, and of each some 40 bytes stay in memory until it is written.

Of tables of up to `LOOKED_AT` rows every row is checked whole and its file looked at, at every start: all that is wrong
is told before any work, and shards whose rows or files have changed are made again. Of a larger table the start tells
rows that cannot be read, lack their path or caption, or are listed twice; the rest is looked at where a shard is made.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from mm.data.files import MAX_PROBLEMS_SHOWN, TEMPORARY_PREFIX, make_folder, write_error
from mm.data.sources.checking import CheckedRow, RowReader
from mm.data.sources.naming import RowNames
from mm.data.store.checksum import DIGEST_BYTES
from mm.data.store.table import write_table
from mm.data.tables import TableRow
from mm.errors import Problem
from mm.extract.plan import KIND, ROWS, TABLE

LOOKED_AT = 100_000
_BUFFER = 2**24  # bytes

Look = Callable[[CheckedRow], str]
"""Look at the file of a row: a word that changes when the file does, or for a bad one the error's id."""


@dataclass(frozen=True, slots=True)
class PlanFacts:
    """Facts that a plan is made from beside the rows.

    Attributes:
        recipe: key of it. shard_rows: rows of a shard, for a number of rows. draws: of each sample.
        inputs: a word that changes when the data sets' tables do; None where only reading all rows can tell.
    """

    recipe: str
    shard_rows: Callable[[int], int]
    draws: int
    inputs: str | None


def draft_plan(
    store: Path, reader: RowReader, facts: PlanFacts, check: Callable[[Iterator[CheckedRow]], None], look: Look
) -> Path:
    """Write a plan beside that of a store; returns its folder.

    Args:
        store: a folder that is there. reader: the rows. facts: what else the plan is made from.
        check: raises what is wrong with rows; it gets all of them, of a large table those alone that lack something.
        look: at the files of a table of up to `LOOKED_AT` rows.

    Raises:
        DataError: what reading the data sets and `check` raise, DATA-018 and DATA-019 when it cannot be written.
    """
    folder = store / f"{TEMPORARY_PREFIX}plan-{uuid4().hex[:12]}"
    make_folder(folder, "the store's folder")
    try:
        listed = _list_rows(folder / ROWS, reader)
        rows = _Rows(folder / ROWS, reader, listed)
        is_small = len(rows) <= LOOKED_AT
        states: list[str] | None = [] if is_small else None
        if states is None:
            check(rows.these(sorted({*listed.lacking, *rows.before})))
        else:
            check(_looking(rows.these(range(len(rows))), look, states))
        _write(folder, listed, rows.kinds, states, facts)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


@dataclass(frozen=True)
class _Listed:
    """All rows as they are listed.

    Attributes:
        first: index of each data set's first row. names: of all rows.
        offsets: of the rows' texts, in bytes, and the end of the last. lines: of the rows of CSV; 0 of others.
        lacking: rows that cannot be read or lack their path or caption; problems: of those that cannot be read.
    """

    first: list[int]
    names: RowNames = field(default_factory=RowNames)
    offsets: array[int] = field(default_factory=lambda: array("Q", [0]))
    lines: array[int] = field(default_factory=lambda: array("I"))
    lacking: list[int] = field(default_factory=list)
    problems: dict[int, Problem] = field(default_factory=dict)


def _list_rows(path: Path, reader: RowReader) -> _Listed:
    """Copy the texts of all rows to a file."""
    found = _Listed([0] * len(reader.sources))
    buffer, end = bytearray(), 0
    with open(path, "xb", buffering=0) as file:
        for index, (source, number, row) in enumerate(reader.rows()):
            if number == 1:
                found.first[source] = index
            key = reader.key(source, row)
            if key is None:
                found.lacking.append(index)
                if row.problem is not None:
                    found.problems[index] = row.problem
            found.names.add(key, source)
            buffer += row.text.encode(errors="surrogateescape")
            found.offsets.append(end + len(buffer))
            found.lines.append(row.line or 0)
            if len(found.lacking) > 100 * MAX_PROBLEMS_SHOWN:  # enough to tell; all of them need not fit
                break
            if len(buffer) > _BUFFER:
                end += _append(path, file, buffer)
        end += _append(path, file, buffer)
    return found


def _append(path: Path, file: FileIO, buffer: bytearray) -> int:
    """Write a buffer out and empty it; returns its size. Raises DATA-018, DATA-019."""
    content = memoryview(bytes(buffer))
    buffer.clear()
    try:
        done = 0
        while done < len(content):
            done += file.write(content[done:]) or 0
        os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, len(content), error) from error
    return len(content)


class _Rows:
    """Rows that were listed, each checked when it is asked for."""

    def __init__(self, path: Path, reader: RowReader, listed: _Listed) -> None:
        self._path, self._reader, self._listed = path, reader, listed
        self.kinds, self.before = listed.names.resolve()

    def __len__(self) -> int:
        return len(self.kinds)

    def these(self, indices: Sequence[int]) -> Iterator[CheckedRow]:
        """Some rows."""
        with open(self._path, "rb") as file:
            for index in indices:
                yield self._check(file, index)

    def _check(self, file: BinaryIO, index: int) -> CheckedRow:
        listed = self._listed
        source = int(np.searchsorted(listed.first, index, side="right")) - 1
        before = self._check(file, self.before[index]).place if index in self.before else None
        row = self._read(file, index, source)
        return self._reader.check(source, index - listed.first[source] + 1, row, int(self.kinds[index]), before)

    def _read(self, file: BinaryIO, index: int, source: int) -> TableRow:
        begin, end = self._listed.offsets[index : index + 2]
        if file.tell() != begin:
            file.seek(begin)
        text = file.read(end - begin).decode(errors="surrogateescape")
        line = self._listed.lines[index] or None
        if index in self._listed.problems:
            return TableRow(text, None, self._listed.problems[index], line)
        return self._reader.row_of(source, text, line)


def _looking(rows: Iterator[CheckedRow], look: Look, states: list[str]) -> Iterator[CheckedRow]:
    """Look at the file of each row that passes; one without a sample is for `check` to refuse."""
    for row in rows:
        states.append(look(row) if row.sample is not None else "")
        yield row


def _write(
    folder: Path, listed: _Listed, kinds: NDArray[np.uint8], states: Sequence[str] | None, facts: PlanFacts
) -> None:
    num_rows = len(kinds)
    shard_rows = facts.shard_rows(num_rows)
    texts, digests = [], []
    whole = blake2b(f"{num_rows} {shard_rows} {facts.draws}".encode(), digest_size=DIGEST_BYTES)
    with open(folder / ROWS, "rb") as file:
        for begin in range(0, num_rows, shard_rows):
            end = min(begin + shard_rows, num_rows)
            content = file.read(listed.offsets[end] - listed.offsets[begin])
            texts.append(blake2b(content, digest_size=DIGEST_BYTES).digest())
            said = blake2b(facts.recipe.encode() + texts[-1] + kinds[begin:end].tobytes(), digest_size=DIGEST_BYTES)
            said.update(np.diff(np.frombuffer(listed.offsets[begin : end + 1], "<u8")).tobytes())
            said.update("\n".join([] if states is None else states[begin:end]).encode())
            digests.append(said.digest())
            whole.update(digests[-1])
    columns: dict[str, NDArray[Any]] = {
        "offsets": np.frombuffer(listed.offsets, "<u8"),
        "kinds": kinds,
        "lines": np.frombuffer(listed.lines, "<u4") if any(listed.lines) else np.zeros(0, "<u4"),
        "texts": np.frombuffer(b"".join(texts), np.uint8).reshape(-1, DIGEST_BYTES),
        "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
    }
    about = {
        "key": whole.hexdigest(),
        "recipe": facts.recipe,
        "inputs": facts.inputs,
        "looked": states is not None,
        "rows": num_rows,
        "shard_rows": shard_rows,
        "draws": facts.draws,
        "sources": listed.first,
    }
    write_table(folder / TABLE, KIND, about, columns)
