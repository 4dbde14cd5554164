"""Tables of rows as files hold them, read one row at a time: a JSON array, JSON lines, or CSV.

However long a table is, what stands in memory is one row and the piece of the file around it. Rows keep their own text,
so that a list without some of them can be written.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import IO, Any

from mm.errors import DataError, Problem

CHUNK = 2**20  # characters of a file that are read at once
MAX_ROW = 2**26  # characters; what is longer than this is no row of a list

_REMEDY = "Check the path, its permissions and that it is UTF-8."


class Form(Enum):
    """Form of a table's file."""

    ARRAY = "a JSON array"
    LINES = "JSON lines"
    CSV = "CSV"


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a table.

    Attributes:
        text: as it stands in the file, with its line end if it ends with one.
        value: what it says, of CSV the cells by column; None where it cannot be read, of which `problem` says why.
        line: number of its first line in the file, of CSV.
    """

    text: str
    value: Any
    problem: Problem | None = None
    line: int | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """First row of a CSV file: its text, and the columns that it names."""

    text: str = ""
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table that is there, not yet read.

    Attributes:
        path: its file. form: what stands in it. header: of CSV.
        error_id: of what is wrong with the file as a whole, and with a row that cannot be read.
    """

    path: Path
    form: Form
    header: Header
    error_id: str

    def __iter__(self) -> Iterator[TableRow]:
        """Read its rows; a line that cannot be read says so itself.

        Raises:
            DataError: `error_id` when the file cannot be read, is not UTF-8, is an array that is not strict JSON, or
                holds no row.
        """
        read = {Form.ARRAY: _array_rows, Form.LINES: _line_rows, Form.CSV: _csv_rows}[self.form]
        is_empty = True
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                for row in read(file, self):
                    is_empty = False
                    yield row
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(self.path, error, self.error_id) from None
        if is_empty:
            raise DataError(self.error_id, f"{self.path} lists no samples.", "Give it at least one row.")

    def row_of(self, text: str, line: int | None = None) -> TableRow:
        """A row that was read without a problem, from its text and line."""
        if self.form is not Form.CSV:
            return TableRow(text, _STRICT.decode(text), line=line)
        cells, _, _ = next(_csv_cells(io.StringIO(text, newline="")))
        if isinstance(cells, csv.Error):
            raise cells
        return TableRow(text, dict(zip(self.header.columns, cells, strict=True)), line=line)

    def text_of(self, rows: Iterable[TableRow]) -> str:
        """A file of the same form with only these of its rows, each as it stood."""
        if self.form is Form.ARRAY:
            return "[" + ",".join(f"\n{row.text}" for row in rows) + "\n]\n"
        texts = chain([self.header.text] if self.header.text else [], (row.text for row in rows))
        return "".join(text if text.endswith(("\n", "\r")) else text + "\n" for text in texts)


def open_table(path: Path, error_id: str) -> Table:
    """Look at the beginning of a table: a file that ends in `.csv` is CSV, of others the first character tells.

    A byte order mark and any line ends are accepted, and NaN, which pandas writes for an empty cell, is null in JSON.

    Raises:
        DataError: `error_id` when the file cannot be read or is not UTF-8, or its header names a column twice or none.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise OSError("it is no regular file")
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return Table(path, Form.CSV, _header(file, path, error_id), error_id)
            first = ""
            while not (first := first.lstrip()) and (piece := file.read(CHUNK)):
                first = piece
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error, error_id) from None
    return Table(path, Form.ARRAY if first.startswith("[") else Form.LINES, Header(), error_id)


def _unreadable(path: Path, error: Exception, error_id: str) -> DataError:
    return DataError(error_id, f"{path} cannot be read ({error}).", _REMEDY)


class _Window:
    """The piece of a file that is looked at, and where in the file it stands."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.text = ""
        self.position = 0
        self.at_end = False
        self._before = 0
        self._lines = 1
        self._column = 1

    def read_on(self) -> None:
        """Let go of what stands before the position, and read some more."""
        gone, kept = self.text[: self.position], self.text[self.position :]
        self._before += len(gone)
        self._lines += gone.count("\n")
        self._column = len(gone) - gone.rfind("\n") if "\n" in gone else self._column + len(gone)
        piece = self._file.read(max(CHUNK, len(kept)))
        self.text, self.position, self.at_end = kept + piece, 0, not piece

    def skip_space(self) -> str:
        """Move behind white space; returns the character there, or an empty text at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.read_on()

    def place(self, position: int) -> str:
        """A position in the window as one in the file."""
        before = self.text[:position]
        line = self._lines + before.count("\n")
        column = position - before.rfind("\n") if "\n" in before else self._column + position
        return f"line {line} column {column} (char {self._before + position})"


def _array_rows(file: IO[str], table: Table) -> Iterator[TableRow]:
    window = _Window(file)
    try:
        window.skip_space()
        window.position += 1  # the bracket
        more = window.skip_space() != "]"
        while more:
            yield _next_value(window)
            more = window.skip_space() == ","
            if more:
                window.position += 1
                window.skip_space()
        if window.skip_space() != "]":
            raise ValueError(f"Expecting ',' or the end of the list: {window.place(window.position)}")
        window.position += 1
        if window.skip_space():
            raise ValueError(f"Extra data: {window.place(window.position)}")
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        message = f"{table.path} is not strict JSON: {error}."
        raise DataError(table.error_id, message, "Correct the file at that place.") from None


def _next_value(window: _Window) -> TableRow:
    """The value at the window's position, which is moved behind it; a value that is cut off is read on."""
    while True:
        try:
            value, end = _STRICT.raw_decode(window.text, window.position)
            if end < len(window.text) - _WORD or window.at_end:  # a number at the end may go on
                text = window.text[window.position : end]
                window.position = end
                return TableRow(text, value)
        except json.JSONDecodeError as error:
            may_go_on = error.msg.startswith("Unterminated string") or error.pos > len(window.text) - _WORD
            if window.at_end or not may_go_on or len(window.text) > MAX_ROW:
                raise ValueError(f"{error.msg}: {window.place(error.pos)}") from None
        window.read_on()


def _line_rows(file: IO[str], table: Table) -> Iterator[TableRow]:
    for number, line in enumerate(file, start=1):  # whose lines end with \n, \r or both: captions may hold others
        if not line.strip():
            continue
        try:
            begin = _skip_space(line, 0)
            value, end = _STRICT.raw_decode(line, begin)
            if _skip_space(line, end) != len(line):
                raise json.JSONDecodeError("Extra data", line, end)
            yield TableRow(line, value)
        except (ValueError, RecursionError) as error:
            message = f"{table.path} line {number} is not strict JSON: {error}."
            remedy = "Give a JSON array, or one JSON object a line."
            yield TableRow(line, None, Problem(table.error_id, message, remedy))


class _CsvLines:
    """Lines of a CSV file, of which it remembers those that the row being read is made of."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._taken: list[str] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self._taken.append(line)
            self.number += 1
            yield line

    def take(self) -> tuple[str, int]:
        """Text of the row, and the number of its first line."""
        text, first = "".join(self._taken), self.number - len(self._taken) + 1
        self._taken.clear()
        return text, first


def _csv_cells(file: IO[str]) -> Iterator[tuple[Sequence[str] | csv.Error, str, int]]:
    """The cells of each row or why they cannot be read, its text, and the number of its first line."""
    lines = _CsvLines(file)
    reader = csv.reader(lines, strict=True)
    while True:
        try:
            cells: Sequence[str] | csv.Error = next(reader)
        except csv.Error as error:
            cells = error
        except StopIteration:
            return
        text, first = lines.take()
        if cells:
            yield cells, text, first


def _header(file: IO[str], path: Path, error_id: str) -> Header:
    cells, text, _ = next(_csv_cells(file), ([], "", 0))
    remedy = "Give it a first row that names each column once, with commas between them."
    if isinstance(cells, csv.Error):
        raise DataError(error_id, f"{path} has a first row that is no CSV ({cells}).", remedy)
    columns = tuple(cell.strip() for cell in cells)
    if not columns:
        raise DataError(error_id, f"{path} is empty.", remedy)
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        found = f"{path} names columns twice: {', '.join(column or '(no name)' for column in twice)}."
        raise DataError(error_id, found, remedy)
    if "" in columns:
        raise DataError(error_id, f"{path} has a column without a name in its first row.", remedy)
    return Header(text, columns)


def _csv_rows(file: IO[str], table: Table) -> Iterator[TableRow]:
    columns = table.header.columns
    rows = _csv_cells(file)
    next(rows)
    for cells, text, line in rows:
        problem = None
        if isinstance(cells, csv.Error):
            message = f"{table.path} line {line} is no CSV: {cells}."
            problem = Problem(table.error_id, message, 'Put a cell with a comma, a quote or a line end in it into "".')
        elif len(cells) != len(columns):
            message = f"{table.path} line {line} has {len(cells)} cells, its first row names {len(columns)} columns."
            problem = Problem("DATA-061", message, 'Correct the row; a cell with a comma goes into double quotes, "".')
        value = dict(zip(columns, cells, strict=True)) if problem is None and not isinstance(cells, csv.Error) else None
        yield TableRow(text, value, problem, line)


def _skip_space(text: str, position: int) -> int:
    """Position at which JSON goes on after white space."""
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _constant(name: str) -> None:
    """Read words that are not JSON and that some write all the same: NaN is an empty cell, Infinity is refused."""
    if name == "NaN":
        return
    raise ValueError(f"{name} is not a JSON number")


_STRICT = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_constant)
_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = 16  # characters of the longest word or escape that a piece of the file may end in
