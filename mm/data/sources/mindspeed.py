"""MindSpeed-MM's data.json: rows of `path`, `cap` and, optionally, `num_frames`, `fps`, `resolution` and `cut`.

What the optional fields say is compared with the video when it is read (mm/data/clips.py). A column with the name of a
role of media (`control`, `reference`, ...) has a path, or a list of paths, below the data set's folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mm.config.base import parse
from mm.config.data import DataSource
from mm.config.tasks.registry import ALL_COLUMNS, ALL_MEDIA
from mm.config.tasks.task import Column
from mm.data.metadata import Annotation
from mm.data.sources.base import Dialect, SourceRow, Taken
from mm.data.sources.cells import Cells, caption_problems
from mm.data.sources.table import UNUSED_COLUMNS, TableSource, Unused, place_of
from mm.data.tables import Form, TableRow
from mm.errors import ConfigError, DataError, Problem

OTHER_NAMES = {"text": "cap", "caption": "cap", "prompt": "cap", "video": "path", "video_path": "path", "file": "path"}


class _Mindspeed(TableSource):
    """A table of rows as `mm.data.metadata.Annotation` has them."""

    def __init__(self, source: DataSource, columns: Sequence[Column]) -> None:
        super().__init__(source, path_columns=("path",), caption_columns=("cap",))
        if self.table.form is Form.CSV:
            found = f"{source.annotation} is CSV, and MindSpeed-MM's rows, which hold lists and objects, are JSON."
            raise DataError("DATA-060", found, "Write it with pandas' to_json(orient='records', lines=True).")
        self._columns = columns
        self._without = Unused(UNUSED_COLUMNS | ALL_COLUMNS - {column.name for column in columns}, source.annotation)

    def read(self, number: int, row: TableRow) -> SourceRow:
        """Read a row whole."""
        place = place_of(self.table, number, row)
        if row.problem is not None:
            return SourceRow(number, place, None, (row.problem,), row)
        values = self._without(row.value) if isinstance(row.value, dict) else row.value
        rest, numbers, problems = _taken_columns(values, self._columns, place)
        rest, roles, wrong_paths = _taken_roles(rest, self.source, place)
        problems += wrong_paths
        try:
            annotation = parse(Annotation, rest, place)
        except ConfigError as error:
            wrong = [Problem("DATA-061", problem.message, problem.remedy) for problem in error.problems]
            return SourceRow(number, place, None, (*wrong, *problems, *_other_names(values, place)), row)
        problems += caption_problems(annotation.captions, place, "cap")
        taken = Taken(annotation, self.source.folder, os.path.normpath(annotation.path), columns=numbers, roles=roles)
        return SourceRow(number, place, taken, tuple(problems), row)


def _taken_columns(values: Any, columns: Sequence[Column], place: str) -> tuple[Any, dict[str, float], list[Problem]]:
    """A row without the task's columns, what stands in them, and what is wrong with that (DATA-061)."""
    if not columns or not isinstance(values, dict):
        return values, {}, []
    rest, found, problems = dict(values), dict[str, float](), list[Problem]()
    for column in columns:
        value = rest.pop(column.name, None)
        if column.holds(value):
            found[column.name] = float(value)
            continue
        what = f"lacks {column.name}" if value is None else f"has {column.name} {value!r}"
        problems.append(Problem("DATA-061", f"{place} {what}; the task takes {column.expected}.", "Correct the row."))
    return rest, found, problems


def _taken_roles(values: Any, source: DataSource, place: str) -> tuple[Any, dict[str, tuple[str, ...]], list[Problem]]:
    """A row without its media, these, and what is wrong with their paths (DATA-061, DATA-063)."""
    given = ALL_MEDIA & values.keys() if isinstance(values, dict) else set()
    if not given:
        return values, {}, []
    cells = Cells({name: values[name] for name in given}, place)
    found = {name: files for name in sorted(given) if (files := cells.files(name, source.folder))}
    return {name: value for name, value in values.items() if name not in given}, found, cells.problems


def _other_names(values: Any, place: str) -> list[Problem]:
    """Problems of columns with other tools' names, where those of here are missing; the remedy is the name here."""
    given = values if isinstance(values, dict) else {}
    return [
        Problem("DATA-061", f'{place}: "{other}" is not read.', f'Call the column "{name}".')
        for other, name in OTHER_NAMES.items()
        if other in given and name not in given
    ]


MINDSPEED = Dialect("mindspeed", (frozenset({"path", "cap"}),), _Mindspeed)
