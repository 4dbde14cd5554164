"""Reading lists of rows, keeping paths inside their folder, and writing files that are never half there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from mm.config.units import format_bytes
from mm.errors import DataError, DataWriteError, Problem, raise_all

MAX_PROBLEMS_SHOWN = 100
TEMPORARY_PREFIX = ".tmp-"


@dataclass(frozen=True, slots=True)
class JsonRow:
    """One row of a list.

    Attributes:
        text: as it stands in the file, with its line end if it is a line.
        value: what it says; None where it is not strict JSON, of which `problem` says why.
    """

    text: str
    value: Any
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class RowList:
    """All rows of a file, and whether they stand in a JSON array."""

    rows: Sequence[JsonRow]
    is_array: bool

    def text_of(self, rows: Sequence[JsonRow]) -> str:
        """A file of the same form with only these of its rows, each as it stood."""
        if self.is_array:
            return "[" + ",".join(f"\n{row.text}" for row in rows) + "\n]\n"
        return "".join(row.text if row.text.endswith(("\n", "\r")) else row.text + "\n" for row in rows)


def read_rows(path: Path, error_id: str) -> list[Any]:
    """Read a JSON array, or JSONL (one JSON value a line); which of the two, the first character tells.

    A byte order mark and CRLF line ends are accepted, and NaN, which pandas writes for an empty cell, is null.

    Raises:
        DataError: `error_id` when the file cannot be read, is not UTF-8 or not strict JSON (a key twice, Infinity), or
            holds no row; all bad lines at once.
    """
    rows = split_rows(path, error_id).rows
    raise_limited([row.problem for row in rows if row.problem is not None])
    return [row.value for row in rows]


def split_rows(path: Path, error_id: str) -> RowList:
    """Read what `read_rows` reads, and keep each row's own text; a line that is not strict JSON says so itself.

    Raises:
        DataError: `error_id` when the file cannot be read, is not UTF-8, is an array that is not strict JSON, or holds
            no row.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
            raise OSError("it is no regular file")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read ({error})."
        raise DataError(error_id, message, "Check the path, its permissions and that it is UTF-8.") from None
    is_array = text.lstrip().startswith("[")
    rows = list(_array_rows(text, path, error_id) if is_array else _line_rows(text, path, error_id))
    if not rows:
        raise DataError(error_id, f"{path} lists no samples.", "Give it at least one row.")
    return RowList(rows, is_array)


def raise_limited(problems: Sequence[Problem]) -> None:
    """Raise a `DataError` with the first hundred problems and the count of the others; none, no error."""
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        more = len(problems) - len(shown)
        shown.append(Problem(problems[-1].id, f"{more} more problems are not shown.", "Correct those above first."))
    raise_all(DataError, shown)


def path_below(root: Path, relative: str, source: str) -> Path:
    """The file that `relative` names below `root`.

    What is checked is the path as it is written. Links that lie below `root` are followed wherever they lead, as every
    other program follows them: whoever owns the folder made them, as the caches of hubs and data on several disks do.

    Args:
        root: the folder that paths start from.
        relative: a path from a file that someone else wrote.
        source: what names the path, for messages.

    Raises:
        DataError: DATA-063 for an empty or absolute path, `..`, or a NUL character.
    """
    pure = PurePosixPath(relative)
    fault = None
    if not relative or not pure.parts:
        fault = "is empty"
    elif "\0" in relative or not is_text(relative):
        fault = "holds a character that no path can"
    elif pure.is_absolute():
        fault = "is absolute"
    elif ".." in pure.parts:
        fault = 'holds ".."'
    if fault is None:
        return (root / pure).absolute()
    raise DataError("DATA-063", f"{source}: the path {relative!r} {fault}.", f"Use a plain path below {root}.")


def require_regular_file(file: Path, place: str) -> None:
    """Refuse what is not a file that can be read to its end and again.

    Raises:
        DataError: DATA-001.
    """
    try:
        mode = file.stat().st_mode
    except OSError as error:
        reason = error.strerror or error
        raise DataError("DATA-001", f"{place}: {file}: {reason}.", "Correct the path or add the video.") from None
    if not stat.S_ISREG(mode):
        raise DataError("DATA-001", f"{place}: {file} is no regular file.", "Name a video file.")
    if not os.access(file, os.R_OK):
        raise DataError("DATA-001", f"{place}: {file} may not be read.", "Correct its permissions.")


def is_text(text: str) -> bool:
    """Test that a string can be written as UTF-8. JSON can spell half a surrogate pair, which no file name can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_atomically(path: Path, parts: Iterable[bytes], num_bytes: int) -> None:
    """Write a file under a temporary name in the same folder, force it to disk, then give it its name.

    Args:
        path: the file; an existing one is replaced in one step.
        parts: its content, in order.
        num_bytes: how many bytes that is, for the message of a full disk.

    Raises:
        DataError: DATA-019 when the disk is full, DATA-018 for other failures to write; the temporary file is gone.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, num_bytes, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path, name: str) -> None:
    """Make a folder with its parents, if it is not there.

    Args:
        folder: which. name: what says so, for the message.

    Raises:
        DataError: DATA-018.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataWriteError("DATA-018", f"{folder} cannot be made: {error}.", f"Correct {name}.") from None


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left behind. Only while nobody writes into `folder`."""
    for entry in os.scandir(folder):
        if not entry.name.startswith(TEMPORARY_PREFIX):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def write_error(path: Path, num_bytes: int, error: OSError) -> DataWriteError:
    """DATA-019 for a full disk or quota, DATA-018 for other failures to write `num_bytes` to a file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return DataWriteError(
            "DATA-019",
            f"{path} needs {format_bytes(num_bytes)} and the disk or quota is full ({format_bytes(free)} free).",
            "Free some space and start again; what is complete is kept.",
        )
    return DataWriteError("DATA-018", f"{path} cannot be written: {error}.", "Check the path and its permissions.")


def sync_folder(folder: Path) -> None:
    """Force to disk which files a folder has."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _array_rows(text: str, path: Path, error_id: str) -> Iterator[JsonRow]:
    position = _skip_space(text, text.index("[") + 1)
    try:
        more = text[position : position + 1] != "]"
        while more:
            value, end = _STRICT.raw_decode(text, position)
            yield JsonRow(text[position:end], value)
            position = _skip_space(text, end)
            more = text[position : position + 1] == ","
            position = _skip_space(text, position + 1) if more else position
        if text[position : position + 1] != "]" or _skip_space(text, position + 1) != len(text):
            raise json.JSONDecodeError("Expecting ',' or the end of the list", text, position)
    except (ValueError, RecursionError) as error:
        remedy = "Correct the file at that place."
        raise DataError(error_id, f"{path} is not strict JSON: {error}.", remedy) from None


def _line_rows(text: str, path: Path, error_id: str) -> Iterator[JsonRow]:
    for number, line in enumerate(_LINE_END.split(text), start=1):  # not splitlines: captions may hold other line ends
        if not line.strip():
            continue
        try:
            begin = _skip_space(line, 0)
            value, end = _STRICT.raw_decode(line, begin)
            if _skip_space(line, end) != len(line):
                raise json.JSONDecodeError("Extra data", line, end)
            yield JsonRow(line, value)
        except (ValueError, RecursionError) as error:
            message = f"{path} line {number} is not strict JSON: {error}."
            yield JsonRow(line, None, Problem(error_id, message, "Give a JSON array, or one JSON object a line."))


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
_LINE_END = re.compile(r"(?<=\n)|(?<=\r)(?!\n)")
