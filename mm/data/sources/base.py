"""Rows of any metadata in one neutral form, and the type of a dialect that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

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
        kind, columns: as in `mm.data.metadata.VideoSample`.
        roles: files beside the target by what they are: paths as the row has them, which may be addresses, or files.
        part: of the source that lists the file; two parts may list one.
    """

    annotation: Annotation
    folder: Path
    name: str
    kind: Kind = "video"
    columns: Mapping[str, float] = field(default_factory=dict)
    roles: Mapping[str, tuple[str | Path, ...]] = field(default_factory=dict)
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


class RowKey(NamedTuple):
    """Words by which a row is told from others before it is checked.

    Attributes:
        name: as `Taken.name`. file: its path. cut: as `Annotation.cut_name`.
        rest: its captions, or the part of the source that lists it.
    """

    name: str
    file: str
    cut: str
    rest: str


class OpenSource(Protocol):
    """A source that is being read. A row's text is all that is needed to read it again.

    Attributes:
        is_table: its annotation file alone says what its rows are.
    """

    is_table: bool

    def rows(self) -> Iterator[TableRow]:
        """Read the texts of its rows, in order, one at a time; of a row that cannot be read its problem.

        Raises:
            DataError: what is wrong with the source as a whole.
        """

    def row_of(self, text: str, line: int | None) -> TableRow:
        """A row that `rows` gave without a problem, from its text and line."""

    def key(self, row: TableRow) -> RowKey | None:
        """Key of a row, which costs little; None where it lacks its path or its caption."""

    def read(self, number: int, row: TableRow) -> SourceRow:
        """Read a row whole; `number` is its own, from 1."""


class Open(Protocol):
    """Opening of a source."""

    def __call__(self, source: DataSource, columns: Sequence[Column], /) -> OpenSource:
        """Open what `source` names; `columns` are the task's, which every row has.

        Raises:
            DataError: DATA-060 for a file that cannot be read, and what else is wrong with it as a whole.
        """


@dataclass(frozen=True)
class Dialect:
    """A dialect of metadata.

    Attributes:
        name: for `format:`.
        marks: columns by which a table of it is known: it has one of each set.
        open: a source of it.
    """

    name: SourceFormat
    marks: tuple[frozenset[str], ...]
    open: Open
