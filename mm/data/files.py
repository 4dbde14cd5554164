"""Reading lists of rows, keeping paths inside their folder, and writing files that are never half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from mm.errors import DataError, Problem, raise_all

MAX_PROBLEMS_SHOWN = 100
TEMPORARY_PREFIX = ".tmp-"


def read_rows(path: Path, error_id: str) -> list[Any]:
    """Read a JSON array, or JSONL (one JSON value a line); which of the two, the first character tells.

    A byte order mark and CRLF line ends are accepted.

    Raises:
        DataError: `error_id` when the file cannot be read, is not UTF-8 or not strict JSON (a key twice, NaN,
            Infinity), or holds no row; all bad lines at once.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read ({error})."
        raise DataError(error_id, message, "Check the path, its permissions and that it is UTF-8.") from None
    if text.lstrip().startswith("["):
        rows, problems = _read_array(text, path, error_id)
    else:
        rows, problems = _read_lines(text, path, error_id)
    if not rows and not problems:
        problems = [Problem(error_id, f"{path} lists no samples.", "Give it at least one row.")]
    raise_limited(problems)
    return rows


def raise_limited(problems: Sequence[Problem]) -> None:
    """Raise a `DataError` with the first hundred problems and the count of the others; none, no error."""
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        more = len(problems) - len(shown)
        shown.append(Problem(problems[-1].id, f"{more} more problems are not shown.", "Correct those above first."))
    raise_all(DataError, shown)


def resolve_inside(root: Path, relative: str, source: str) -> Path:
    """The file that `relative` names below `root`.

    Args:
        root: the folder that paths start from; it may itself be a link.
        relative: a path from a file that someone else wrote.
        source: what names the path, for messages.

    Raises:
        DataError: DATA-063 for an empty or absolute path, `..`, a NUL character, or a link that leads out of `root`.
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
    else:
        try:
            resolved = (root / pure).resolve()
            if resolved.is_relative_to(root.resolve()):
                return resolved
            fault = f"leads out of {root} to {resolved}"
        except (OSError, RuntimeError):  # a loop of links; which of the two depends on the Python version
            fault = "is a loop of links or cannot be resolved"
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
    """Whether a string can be written as UTF-8. JSON can spell half a surrogate pair, which no file name can hold."""
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
        _sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, num_bytes, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed processes left behind. Only while nobody writes into `folder`."""
    for entry in os.scandir(folder):
        if entry.name.startswith(TEMPORARY_PREFIX):
            os.unlink(entry.path)


def _write_error(path: Path, num_bytes: int, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return DataError(
            "DATA-019",
            f"{path} needs {num_bytes / 2**20:.1f} MiB and the disk or quota is full ({free / 2**20:.1f} MiB free).",
            "Free some space and start again; what is complete is kept.",
        )
    return DataError("DATA-018", f"{path} cannot be written: {error}.", "Check the path and its permissions.")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_array(text: str, path: Path, error_id: str) -> tuple[list[Any], list[Problem]]:
    try:
        return _strict_json(text), []
    except (ValueError, RecursionError) as error:
        return [], [Problem(error_id, f"{path} is not strict JSON: {error}.", "Correct the file at that place.")]


def _read_lines(text: str, path: Path, error_id: str) -> tuple[list[Any], list[Problem]]:
    rows: list[Any] = []
    problems: list[Problem] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: captions may hold other line ends
        if not line.strip():
            continue
        try:
            rows.append(_strict_json(line))
        except (ValueError, RecursionError) as error:
            message = f"{path} line {number} is not strict JSON: {error}."
            problems.append(Problem(error_id, message, "Give a JSON array, or one JSON object a line."))
    return rows, problems


def _strict_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
