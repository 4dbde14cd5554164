"""Rows of data sets as samples: every row checked before any work begins, whichever dialect it is in."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mm.config.data import DataSource, data_sources, default_folder
from mm.config.run.extraction import SourceSection
from mm.config.tasks.task import Column, Media, MediaKind, Task
from mm.data.beside import poses_of
from mm.data.files import path_below, require_regular_file
from mm.data.metadata import Kind, VideoSample
from mm.data.remote.media import RemoteFile, find_object, is_object, reading
from mm.data.sources.base import OpenSource, RowKey, SourceRow
from mm.data.sources.cells import kind_of
from mm.data.sources.naming import LISTED_BEFORE, RowNames, sample_id
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
            DATA-064 for the row itself; DATA-245 to DATA-247 and DATA-250 to DATA-252 for the files beside its target.
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
    said = {name: getattr(section, name) for name in ("format", "file_keys", "left_out", "entry", "storage")}
    return [replace(source, **said) for source in sources]


def iterate_rows(sources: Sequence[DataSource], task: Task | None = None) -> Iterator[CheckedRow]:
    """The rows of all data sets, in order, one at a time, each checked. They are gone through twice: for their names
    first, of which some bytes a row stay in memory.

    Raises:
        DataError: DATA-060 for a file that cannot be read, and what its dialect raises for a file as a whole.
    """
    opened = RowReader(sources, task)
    names = RowNames()
    for source, _, row in opened.rows():
        names.add(opened.key(source, row), source)
    kinds, before = names.resolve()
    first = set(before.values())
    places: dict[int, str] = {}
    for index, (source, number, row) in enumerate(opened.rows()):
        listed_before = places[before[index]] if index in before else None
        checked = opened.check(source, number, row, int(kinds[index]), listed_before)
        if index in first:
            places[index] = checked.place
        yield checked


class RowReader:
    """Data sets, open, and the samples that their rows describe."""

    def __init__(self, sources: Sequence[DataSource], task: Task | None = None) -> None:
        """Open them; arguments and errors are those of `iterate_rows`."""
        columns: tuple[Column, ...] = task.columns if task is not None else ()
        self.sources, self._task = sources, task
        self._media = {media.name: media for media in (task.media if task is not None else ())}
        self._open: list[OpenSource] = [dialect_of(source).open(source, columns) for source in sources]
        self._told: list[set[str]] = [set() for _ in sources]

    def are_tables(self) -> list[bool]:
        """Tell of each data set whether its table alone says what its rows are."""
        return [opened.is_table for opened in self._open]

    def rows(self) -> Iterator[tuple[int, int, TableRow]]:
        """All rows in order, unchecked: which data set (0, 1, ...), which row of it (1, 2, ...), and its text."""
        for source, opened in enumerate(self._open):
            for number, row in enumerate(opened.rows(), start=1):
                yield source, number, row

    def row_of(self, source: int, text: str, line: int | None) -> TableRow:
        """A row that `rows` gave without a problem, from its text and line."""
        return self._open[source].row_of(text, line)

    def key(self, source: int, row: TableRow) -> RowKey | None:
        """Key of a row; None for one that cannot be read, or lacks its path or caption."""
        return self._open[source].key(row) if row.problem is None else None

    def check(self, source: int, number: int, row: TableRow, kind: int, listed_before: str | None = None) -> CheckedRow:
        """The sample that a row describes, with all that is wrong with it.

        Args:
            source, number, row: as `rows` gives them. kind: of its id (`mm.data.sources.naming`).
            listed_before: the place of the row that said the same, where there is one.
        """
        found = self._open[source].read(number, row)
        taken, problems = found.taken, list(found.problems)
        self._tell_roles(source, found)
        sample = None
        if taken is not None:
            task, annotation = self._task, taken.annotation
            try:
                files = _Files(self.sources[source], taken.folder, found.place)
                file = files.find(annotation.path)
                if kind == LISTED_BEFORE:
                    said = f"{annotation.path} is listed before, with this cut and caption, in {listed_before}."
                    raise DataError("DATA-064", f"{found.place}: {said}", "Keep one of the two rows.")
                name = f"{source}:{taken.name}" if source else taken.name
                name = sample_id(name, annotation.cut_name, json.dumps(annotation.captions), kind)
                given, twice = (taken.roles, []) if task is None else _roles_of(task, taken.roles, found.place)
                problems += twice
                roles = {role: tuple(map(files.find, paths)) for role, paths in given.items()}
                objects = tuple(files.objects)
                sample = VideoSample(
                    name, file, annotation.captions, annotation, taken.columns, taken.kind, roles, objects
                )
                is_path_wrong = any(problem.id == "DATA-063" for problem in problems)  # which may be that role's
                beside = beside_problems(sample, tuple(self._media.values()), found.place)
                problems += [one for one in beside if not (one.id == "DATA-245" and is_path_wrong)]
                if task is not None and task.fewest_latent_frames > 1 and taken.kind == "image":
                    message = (
                        f"{found.place}: {file} is an image, and {task.name} learns from what follows a first frame."
                    )
                    problems.append(Problem("DATA-047", message, "Leave the row out; clips need at least 5 frames."))
                if sample.object_of(file) is None:
                    require_regular_file(file, found.place)
            except DataError as error:
                problems += error.problems
        return CheckedRow(source, number, found.place, sample, tuple(problems), found.row)

    def _tell_roles(self, source: int, row: SourceRow) -> None:
        """Say once for each role that the task does not take its files."""
        if row.taken is None or self._task is None:
            return
        new = row.taken.roles.keys() - _named_of(self._task, row.taken.roles).keys() - self._told[source]
        if new:
            message = "%s: the task %s takes no files of the roles %s; they are left out"
            log.info(message, self.sources[source].annotation, self._task.name, ", ".join(sorted(new)))
            self._told[source] |= new


def _roles_of(
    task: Task, given: Mapping[str, tuple[str | Path, ...]], place: str
) -> tuple[dict[str, tuple[str | Path, ...]], list[Problem]]:
    """Files of a row by the task's roles, and DATA-252 where two of its roles are one of the task's."""
    found, problems = dict[str, tuple[str | Path, ...]](), list[Problem]()
    named = _named_of(task, given)
    for role, name in named.items():
        others = [other for other, same in named.items() if same == name]
        if role == others[-1] and len(others) > 1:
            said = f"{place} names files of the roles {' and '.join(others)}, which are one for {task.name}: {name}."
            problems.append(Problem("DATA-252", said, f"Keep one of them, or call it {name}."))
        found[name] = given[role]
    return found, problems


def _named_of(task: Task, given: Mapping[str, tuple[str | Path, ...]]) -> dict[str, str]:
    """The roles of a row that a task takes, each with the task's name for it; its own name goes before others."""
    found = dict[str, str]()
    for media in task.media:
        names = (media.name,) if given.get(media.name) else media.also
        found |= {role: media.name for role in names if given.get(role)}
    return found


class _Files:
    """Files that a row names: below its folder, or copies of objects, which are asked for but not fetched."""

    def __init__(self, source: DataSource, folder: Path, place: str) -> None:
        self._source, self._folder, self._place = source, folder, place
        self.objects: list[RemoteFile] = []

    def find(self, path: str | Path) -> Path:
        """The file of a path; raises DATA-063 and what `mm.data.remote.media.find_object` raises."""
        if isinstance(path, Path):
            return path
        if not is_object(path):
            return path_below(self._folder, path, self._place)
        self.objects.append(find_object(path, self._source.storage, self._place))
        return self.objects[-1].copy


def beside_problems(sample: VideoSample, media: Sequence[Media], place: str) -> Iterator[Problem]:
    """Problems of the files beside a target, by what the task takes.

    DATA-245 for a role that is not given, DATA-246 for more files than are taken, DATA-247 for a file of another kind,
    DATA-250 for a role of generation alone, DATA-251 for each malformed line of a pose file, DATA-001 for a file that
    is not there.
    """
    for one in media:
        files = sample.roles.get(one.name, ())
        if not files and one.required and one.from_clip is None:
            found = (
                f"{place} names no file of the role {one.name}, which every row of this task has: {_NAMED[one.kind]}."
            )
            yield Problem("DATA-245", found, "Add it (docs/data.md names the column), or leave the row out.")
        if len(files) > one.most:
            taken = "one is taken" if one.most == 1 else f"at most {one.most} are taken"
            found = f"{place} names {len(files)} files of the role {one.name}, and {taken}."
            yield Problem("DATA-246", found, "Keep one of them." if one.most == 1 else f"Keep {one.most} of them.")
        if files and not one.is_trained:
            found = (
                f"{place} names files of the role {one.name}: training has the clip's own first frame in their place"
            )
            other = "as DiffSynth-Studio's and VideoX-Fun's trainers do, and no features are made of another image"
            yield Problem("DATA-250", f"{found}, {other}.", "Remove them from the row; in generation they are taken.")
        for file in files:
            if not _is_of_kind(file, one.kind, sample.kind):
                wanted = _NAMED["image" if one.kind == "video" and sample.kind == "image" else one.kind]
                found = f"{place}: by its ending {file} is not what the role {one.name} takes beside this {sample.kind}"
                yield Problem("DATA-247", f"{found}: {wanted}.", "Correct the path, or give the file its own ending.")
            remote = sample.object_of(file)
            try:
                if remote is None:
                    require_regular_file(file, place)
                if one.kind == "poses" and _is_of_kind(file, one.kind, sample.kind):
                    reading([] if remote is None else [remote], partial(poses_of, file))
            except DataError as error:
                yield from error.problems


_NAMED: dict[MediaKind, str] = {
    "video": "a video",
    "image": "an image",
    "images": "images",
    "mask": "a video or an image",
    "poses": "a file of camera poses, .txt",
}


def _is_of_kind(file: Path, kind: MediaKind, target: Kind) -> bool:
    """Tell whether a file may have a role, by its ending: beside an image no video is taken, but another image."""
    found = kind_of(str(file))
    if kind == "poses":
        return file.suffix.lower() == ".txt"
    if kind in ("video", "mask") and target == "image":
        return found == "image"
    return found in {"video": ("video",), "mask": ("video", "image")}.get(kind, ("image",))
