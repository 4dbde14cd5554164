"""Rows of a table in which a dialect takes each cell by its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.config.data import DataSource
from mm.config.tasks.registry import ALL_COLUMNS
from mm.config.tasks.task import Column
from mm.data.metadata import Annotation
from mm.data.sources.base import SourceRow, Taken
from mm.data.sources.cells import Cells
from mm.data.tables import Form, Table, TableRow, open_table
from mm.errors import DataError, Problem

log = logging.getLogger(__name__)

_SCORES = ("aes", "aesthetic", "aesthetic_score", "cmotion", "flow", "match", "motion", "motion_score", "tech")
_FACTS = ("aspect_ratio", "duration", "height", "id", "motion_average", "motion_fps", "relpath", "size", "width")
UNUSED_COLUMNS = frozenset((*_SCORES, *_FACTS))
"""Columns of the annotation files of MindSpeed-MM, Open-Sora and Open-Sora Plan."""


Take = Callable[["Cells", DataSource], Taken | None]
"""What a row of a dialect says, from its cells; None where they have problems."""


def table_rows(
    source: DataSource,
    columns: Sequence[Column],
    *,
    take: Take,
    needed: Sequence[frozenset[str]],
    unused: frozenset[str] = UNUSED_COLUMNS,
) -> Iterator[SourceRow]:
    """Rows of a table in which each cell is taken by its name.

    Args:
        source, columns: as in `Read`.
        take: what a row says.
        needed: columns of which the header of a CSV file has at least one each.
        unused: columns on which nothing here depends, beside those of other tasks.

    Raises:
        DataError: DATA-060 for a file that cannot be read, or whose header lacks a column.
    """
    table = open_table(source.annotation, "DATA-060")
    require_columns(table, needed)
    without = Unused(unused | ALL_COLUMNS - {column.name for column in columns}, source.annotation)
    for number, row in enumerate(table, start=1):
        place = place_of(table, number, row)
        if row.problem is not None:
            yield SourceRow(number, place, None, (row.problem,), row)
            continue
        if not isinstance(row.value, dict):
            message = f"{place} is {row.value!r:.80}, and no object with columns."
            yield SourceRow(number, place, None, (Problem("DATA-061", message, "Correct the row."),), row)
            continue
        cells = Cells(without(row.value), place)
        numbers = {column.name: cells.column(column) for column in columns}
        taken = take(cells, source)
        cells.refuse_the_rest()
        if taken is not None and not cells.problems:
            taken = replace(taken, columns={name: n for name, n in numbers.items() if n is not None})
        yield SourceRow(number, place, taken, tuple(cells.problems), row)


def place_of(table: Table, number: int, row: TableRow) -> str:
    """Name of a row in messages."""
    return f"{table.path} row {number}" + (f" (line {row.line})" if row.line is not None else "")


def require_columns(table: Table, needed: Sequence[frozenset[str]]) -> None:
    """Refuse a CSV file whose first row names none of some columns that every row needs.

    Raises:
        DataError: DATA-060.
    """
    lacking = [group for group in needed if table.form is Form.CSV and not group & set(table.header.columns)]
    if lacking:
        found = ", ".join(table.header.columns)
        expected = " and ".join(" or ".join(sorted(group)) for group in lacking)
        remedy = "Name the columns in the first row, with commas between them."
        raise DataError("DATA-060", f"{table.path} lacks a column {expected}; its first row has {found:.200}.", remedy)


class Unused:
    """Columns of one file that are left out; the log says once which they are."""

    def __init__(self, columns: frozenset[str], annotation: Path) -> None:
        self._columns, self._annotation = columns, annotation
        self._told: set[str] = set()

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        """A row without them."""
        unused = self._columns & values.keys()
        if new := sorted(unused - self._told):
            message = "%s: nothing here depends on the columns %s; they are left out"
            log.info(message, self._annotation, ", ".join(new))
            self._told |= unused
        return {name: value for name, value in values.items() if name not in unused} if unused else values


def target(path: str | None, captions: Sequence[str], source: DataSource, **more: Any) -> Taken | None:
    """Contents of a row with this path and these captions; None where it has no path.

    Args:
        path, captions: of the target. source: whose folder the path starts from.
        more: other fields of `Annotation`, and `kind` and `roles`.
    """
    if path is None:
        return None
    beside = {name: more.pop(name) for name in ("kind", "roles") if name in more}
    annotation = Annotation(path=path, cap=captions[0] if len(captions) == 1 else list(captions), **more)
    return Taken(annotation, source.folder, os.path.normpath(path), **beside)
