"""Reading lists whole, keeping paths inside their folder, and writing files that are never half there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from mm.config.units import format_bytes
from mm.data.tables import open_table
from mm.errors import DataError, DataWriteError, Problem, raise_all

MAX_PROBLEMS_SHOWN = 100
TEMPORARY_PREFIX = ".tmp-"


def read_rows(path: Path, error_id: str) -> list[Any]:
    """Read a JSON array, or JSONL (one JSON value a line), whole; see `mm.data.tables`.

    Raises:
        DataError: `error_id` when the file cannot be read, is not UTF-8 or not strict JSON (a key twice, Infinity), or
            holds no row; all bad lines at once.
    """
    rows = list(open_table(path, error_id))
    raise_limited([row.problem for row in rows if row.problem is not None])
    return [row.value for row in rows]


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
        DataError: DATA-063 for an empty or absolute path, `..`, a NUL character, or an address (`https://...`).
    """
    pure = PurePosixPath(relative)
    fault = None
    if not relative or not pure.parts:
        fault = "is empty"
    elif "\0" in relative or not is_text(relative):
        fault = "holds a character that no path can"
    elif _URL.match(relative):
        fault = "is an address, and nothing is fetched"
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
        with suppress(OSError):  # which the failure above names already
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


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
