"""Rows of any metadata in one neutral form, and the type of a dialect that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mm.config.data import DataSource, SourceFormat
from mm.config.tasks.task import Column
from mm.data.metadata import Annotation, Kind
from mm.data.tables import TableRow
from mm.errors import Problem


@dataclass(frozen=True, slots=True)
class Taken:
    """Contents of a row, whatever its dialect calls them.

    Attributes:
        annotation: path, captions, facts. folder: that its path starts from.
        name: id of its sample where the file is listed once, without the data set's number.
        kind, columns, roles: as in `mm.data.metadata.VideoSample`.
        part: of the source that lists the file; two parts may list one.
    """

    annotation: Annotation
    folder: Path
    name: str
    kind: Kind = "video"
    columns: Mapping[str, float] = field(default_factory=dict)
    roles: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)
    part: str = ""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of a source.

    Attributes:
        number: of the row, from 1. place: how to call it in messages.
        taken: what it says; None where it says nothing that can be used.
        problems: what is wrong with it, of what is known without looking at its files.
        row: as it stands in the table; None where the source has no table.
    """

    number: int
    place: str
    taken: Taken | None
    problems: tuple[Problem, ...] = ()
    row: TableRow | None = None


class Read(Protocol):
    """Reading of a source: its rows, one at a time."""

    def __call__(self, source: DataSource, columns: Sequence[Column], /) -> Iterator[SourceRow]:
        """Read what `source` names; `columns` are the task's, which every row has."""


@dataclass(frozen=True)
class Dialect:
    """A dialect of metadata.

    Attributes:
        name: for `format:`.
        marks: columns by which a table of it is known: it has one of each set.
        read: its rows.
    """

    name: SourceFormat
    marks: tuple[frozenset[str], ...]
    read: Read
