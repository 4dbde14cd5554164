"""Rows of data sets as samples: every row checked before any work begins, whichever dialect it is in."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from mm.config.data import DataSource, data_sources, default_folder
from mm.config.run.extraction import SourceSection
from mm.config.tasks.task import Column, Task
from mm.data.features import text_hash
from mm.data.files import path_below, raise_limited, require_regular_file
from mm.data.metadata import VideoSample
from mm.data.sources.base import SourceRow, Taken
from mm.data.sources.registry import dialect_of
from mm.data.tables import TableRow
from mm.errors import DataError, Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """One row of a source, checked.

    Attributes:
        source, number: which data set (0, 1, ...) and which row of it (1, 2, ...).
        place: how to call the row in messages.
        sample: what it describes; None where that cannot be told.
        problems: DATA-001 for a missing file; DATA-047 for an image where the task has given frames; DATA-060 to
            DATA-064 for the row itself.
        row: as it stands in its table, where it has one and that is asked for.
    """

    source: int
    number: int
    place: str
    sample: VideoSample | None
    problems: tuple[Problem, ...]
    row: TableRow | None = None


def annotated_sources(section: SourceSection) -> list[DataSource]:
    """The data sets that an extraction names.

    Raises:
        ConfigError: what `mm.config.data.data_sources` raises.
    """
    folder = section.folder or default_folder(section.path, section.format)
    sources = data_sources(section.path, folder)
    said = {name: getattr(section, name) for name in ("format", "file_keys", "entry", "storage")}
    return [replace(source, **said) for source in sources]


def check_rows(sources: Sequence[DataSource], task: Task | None = None) -> list[CheckedRow]:
    """Check every row of all data sets, in order, and keep what is wrong beside each.

    Args:
        sources: the data sets. task: that the samples are for; None, for none that is known.

    Raises:
        DataError: what `iterate_rows` raises, and DATA-060 for all rows at once that are no rows of any kind.
    """
    rows = list(iterate_rows(sources, task))
    raise_limited([problem for row in rows for problem in row.problems if problem.id == "DATA-060"])
    return rows


def iterate_rows(sources: Sequence[DataSource], task: Task | None = None) -> Iterator[CheckedRow]:
    """The rows of all data sets, in order, one at a time, each checked.

    What stays in memory of a row that was given are the keys by which it would be found again.

    Raises:
        DataError: DATA-060 for a file that cannot be read, and what its dialect raises for a file as a whole.
    """
    listed = Listed()
    for source_number, source in enumerate(sources):
        for row in check_source(source, source_number, listed, task):
            yield replace(row, row=None)


def check_source(source: DataSource, number: int, listed: Listed, task: Task | None) -> Iterator[CheckedRow]:
    """The rows of one data set, checked.

    Args:
        source: the data set. number: which one it is.
        listed: the rows before it; its own are added.
        task: as in `check_rows`.
    """
    columns: tuple[Column, ...] = task.columns if task is not None else ()
    told = set[str]()
    for row in dialect_of(source).read(source, columns):
        roles = set() if row.taken is None else row.taken.roles.keys() - told
        if roles:
            log.info(
                "%s: no task takes files of the roles %s; they are left out",
                source.annotation,
                ", ".join(sorted(roles)),
            )
            told |= roles
        yield _check(row, number, listed, task)


def _check(row: SourceRow, source: int, listed: Listed, task: Task | None) -> CheckedRow:
    taken, problems = row.taken, list(row.problems)
    sample = None
    if taken is not None:
        try:
            file = path_below(taken.folder, taken.annotation.path, row.place)
            name = listed.add(taken, f"{source}:{taken.name}" if source else taken.name, row.place)
            kept = taken.annotation, taken.columns, taken.kind, taken.roles
            sample = VideoSample(name, file, taken.annotation.captions, *kept)
            if task is not None and task.frames and taken.kind == "image":
                message = f"{row.place}: {file} is an image; the one frame that it has is given in {task.name}."
                problems.append(Problem("DATA-047", message, "Leave the row out; clips need at least 5 frames."))
            require_regular_file(file, row.place)
        except DataError as error:
            problems += error.problems
    return CheckedRow(source, row.number, row.place, sample, tuple(problems), row.row)


class Listed:
    """The rows of some sources so far: gives each sample its id, and knows what was listed before.

    A row is kept as two keys of 16 bytes and its place, some 0.5 kB.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, str] = {}  # file, cut and captions: where
        self._ids: dict[bytes, str] = {}
        self._folders: dict[Path, str] = {}

    def add(self, taken: Taken, name: str, place: str) -> str:
        """The id of a row's sample.

        A file is known by the path that is written; where a link leads does not matter. Each part of a source may list
        it.

        Args:
            taken: what the row says. name: the id of a file that is listed once. place: how to call the row.

        Raises:
            DataError: DATA-064 for a row that says what one before it said.
        """
        row = taken.annotation
        if taken.folder not in self._folders:
            self._folders[taken.folder] = os.path.realpath(taken.folder)
        captions = json.dumps(row.captions)
        file = os.path.join(self._folders[taken.folder], os.path.normpath(row.path))
        what = _key(file, row.cut_name, captions, taken.part)
        names = (name, f"{name}//{row.cut_name}", f"{name}//{row.cut_name}//{text_hash(captions)}")
        free = [name for name in names if _key(name) not in self._ids]
        if what in self._rows or not free:
            before = self._rows.get(what) or self._ids[_key(name)]
            message = f"{place}: {row.path} is listed before, with this cut and caption, in {before}."
            raise DataError("DATA-064", message, "Keep one of the two rows.")
        self._rows[what] = self._ids[_key(free[0])] = place
        return free[0]


def _key(*words: str) -> bytes:
    """Sixteen bytes that stand for some words."""
    return blake2b("\0".join(words).encode(errors="surrogateescape"), digest_size=16).digest()
