"""Lines of text files that hold one or more paths with commas between, as data.txt and lists of images have them.

A path that a comma, a quote or white space at an end would change stands in double quotes, a quote in it twice: the
CSV of RFC 4180, as Python's `csv` module reads it. A line without quotes whose commas can be read in several ways is
read in the one that names what exists.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import combinations, pairwise

from mm.errors import ConfigError

Fields = tuple[str, ...]

_QUOTED = re.compile(r'(?:^|,)\s*"')


class LineError(ValueError):
    """A line that names no paths, or not clearly which; its text says why."""


def read_paths(line: str, counts: Collection[int], exist: Callable[[Fields], bool]) -> Fields:
    """The paths of a line.

    Args:
        line: without its line end; white space around paths without quotes is no part of them.
        counts: how many paths a line may have.
        exist: whether what these paths name is there; asked only where a line without quotes has a comma too many, or
            may be one path with commas as well as several.

    Raises:
        LineError: for another number of paths, an empty one, wrong quoting, or several readings that all exist.
    """
    if "\0" in line:
        raise LineError("holds a NUL, which no path can")
    if _QUOTED.search(line):
        return _quoted(line.strip(), counts)
    parts = line.split(",")
    readings = [reading for count in sorted(counts) for reading in _groups(parts, count) if all(reading)]
    if not readings:
        raise LineError(f"has {len(parts)} paths" if all(map(str.strip, parts)) else "has an empty path")
    there = readings if len(readings) == 1 else [reading for reading in readings if exist(reading)]
    if len(there) > 1:
        raise LineError("can be read in several ways: " + "; or ".join(" and ".join(r) for r in there))
    if there:
        return there[0]
    plain = tuple(part.strip() for part in parts)
    if plain not in readings:
        raise LineError(f"has {len(parts) - 1} commas, and no way to read them names what exists")
    return plain


def write_paths(paths: Sequence[str], separator: str = ",") -> str:
    """A line, without its end, that `read_paths` reads as these paths whatever exists.

    Args:
        paths: at least one.
        separator: a comma, and white space after it for readers.

    Raises:
        ConfigError: CFG-130 for a path that no line can hold.
    """
    for path in paths:
        require_writable_as_text(path)
    if any("," in path or path.startswith(('"', "#")) or path != path.strip() for path in paths):
        paths = ['"' + path.replace('"', '""') + '"' for path in paths]
    return separator.join(paths)


def require_writable_as_text(path: str) -> None:
    """Refuse a path that cannot stand in a list of paths.

    Raises:
        ConfigError: CFG-130 for a line end in it, or bytes that are no UTF-8.
    """
    fault = "a line end" if "\n" in path or "\r" in path else None if _is_text(path) else "bytes that are no UTF-8"
    if fault is not None:
        message = f"The path {path!r} holds {fault}, and the lists that name it are UTF-8 text, one line each."
        raise ConfigError("CFG-130", message, "Give another path.")


def _quoted(line: str, counts: Collection[int]) -> Fields:
    try:
        (fields,) = csv.reader([line], strict=True, skipinitialspace=True)
    except (csv.Error, ValueError) as error:
        raise LineError(f"has quotes that do not belong together ({error})") from None
    if len(fields) not in counts or not all(fields):
        raise LineError(f"has {len(fields)} paths" if all(fields) else "has an empty path")
    return tuple(fields)


def _groups(parts: Sequence[str], count: int) -> Iterator[Fields]:
    """Every way to join neighbouring parts, at their commas, to `count` paths."""
    for cuts in combinations(range(1, len(parts)), count - 1):
        ends = [0, *cuts, len(parts)]
        yield tuple(",".join(parts[a:b]).strip() for a, b in pairwise(ends))


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
