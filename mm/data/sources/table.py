"""Rows of a table in which a dialect takes each cell by its name."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.config.data import DataSource
from mm.config.tasks.registry import ALL_COLUMNS
from mm.config.tasks.task import Column
from mm.data.metadata import Annotation, cut_name
from mm.data.sources.base import RowKey, SourceRow, Taken
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


class TableSource:
    """A source whose rows stand in a table, each as its text."""

    is_table = True

    def __init__(self, source: DataSource, *, path_columns: Sequence[str], caption_columns: Sequence[str]) -> None:
        """Open the table.

        Args:
            source: the data set.
            path_columns, caption_columns: those in which the path of the target and its captions may stand.

        Raises:
            DataError: DATA-060 for a file that cannot be read.
        """
        self.source = source
        self.table = open_table(source.annotation, "DATA-060")
        self._paths, self._captions = path_columns, caption_columns
        self._folder = os.path.realpath(source.folder)

    def rows(self) -> Iterator[TableRow]:
        """Read its rows."""
        return iter(self.table)

    def row_of(self, text: str, line: int | None) -> TableRow:
        """A row from its text and line."""
        return self.table.row_of(text, line)

    def key(self, row: TableRow) -> RowKey | None:
        """Key of a row."""
        if not isinstance(row.value, dict):
            return None
        path = _first_given(row.value, self._paths)
        captions = _first_given(row.value, self._captions)
        if not isinstance(path, str) or not path or captions is None:
            return None
        if isinstance(captions, list):
            if not captions or not all(isinstance(caption, str) for caption in captions):
                return None
            captions = captions[0] if len(captions) == 1 else json.dumps(captions)
        elif not isinstance(captions, str):
            return None
        name = os.path.normpath(path)
        return RowKey(name, f"{self._folder}/{name}", cut_name(row.value.get("cut")), captions)


def _first_given(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the first of some columns that has one, which may be an empty text."""
    found = None
    for name in names:
        value = values.get(name)
        if value:
            return value
        found = value if found is None else found
    return found


class CellSource(TableSource):
    """A table in which each cell is taken by its name."""

    def __init__(
        self,
        source: DataSource,
        columns: Sequence[Column],
        *,
        take: Take,
        path_columns: Sequence[str],
        caption_columns: Sequence[str],
        unused: frozenset[str] = UNUSED_COLUMNS,
    ) -> None:
        """Open the table.

        Args:
            source, columns: as in `Open`.
            take: what a row says.
            path_columns, caption_columns: as in `TableSource`; the header of a CSV file has at least one of each.
            unused: columns on which nothing here depends, beside those of other tasks.

        Raises:
            DataError: DATA-060 for a file that cannot be read, or whose header lacks a column.
        """
        super().__init__(source, path_columns=path_columns, caption_columns=caption_columns)
        require_columns(self.table, (frozenset(path_columns), frozenset(caption_columns)))
        self._columns, self._take = columns, take
        self._without = Unused(unused | ALL_COLUMNS - {column.name for column in columns}, source.annotation)

    def read(self, number: int, row: TableRow) -> SourceRow:
        """Read a row whole."""
        place = place_of(self.table, number, row)
        if row.problem is not None:
            return SourceRow(number, place, None, (row.problem,), row)
        if not isinstance(row.value, dict):
            message = f"{place} is {row.value!r:.80}, and no object with columns."
            return SourceRow(number, place, None, (Problem("DATA-061", message, "Correct the row."),), row)
        cells = Cells(self._without(row.value), place)
        numbers = {column.name: cells.column(column) for column in self._columns}
        taken = self._take(cells, self.source)
        cells.refuse_the_rest()
        if taken is not None and not cells.problems:
            taken = replace(taken, columns={name: n for name, n in numbers.items() if n is not None})
        return SourceRow(number, place, taken, tuple(cells.problems), row)


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
