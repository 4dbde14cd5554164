"""Annotations of a raw data set: every row checked before any work begins.

The format is MindSpeed-MM's data.json: rows of `path`, `cap` and, optionally, `num_frames`, `fps`, `resolution` and
`cut`, and the columns that the task declares (`mm.config.tasks`). What the optional fields say is compared with the
video when it is read (mm/data/clips.py). Columns that such files often have and that nothing here depends on are left
out, which the log says once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from mm.config.base import Section, parse
from mm.config.data import DataSource
from mm.config.tasks.registry import ALL_COLUMNS
from mm.config.tasks.task import Column
from mm.data.features import text_hash
from mm.data.files import path_below, read_rows, require_regular_file
from mm.errors import ConfigError, DataError, Problem
from mm.rng import generator

log = logging.getLogger(__name__)

MAX_CAPTION_CHARACTERS = 65536  # far beyond 512 tokens; longer is a mistake in the file, and slow to tokenise

_SCORES = ("aes", "aesthetic", "aesthetic_score", "cmotion", "flow", "match", "motion", "motion_score", "tech")
_FACTS = ("aspect_ratio", "duration", "height", "id", "motion_average", "motion_fps", "relpath", "size", "width")
UNUSED_COLUMNS = frozenset((*_SCORES, *_FACTS))
"""Columns of the annotation files of MindSpeed-MM, Open-Sora and Open-Sora Plan."""
OTHER_NAMES = {"text": "cap", "caption": "cap", "prompt": "cap", "video": "path", "video_path": "path", "file": "path"}


def _whole(value: Any) -> Any:
    """80 for 80.0: pandas writes a column of whole numbers so when one of its cells is empty."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


PositiveInt = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
FrameNumber = Annotated[int, BeforeValidator(_whole), Field(ge=0)]


class Resolution(Section):
    """Size of a video in pixels."""

    height: PositiveInt
    width: PositiveInt


class Annotation(Section):
    """One row. An empty caption is accepted (it is what classifier-free guidance trains on); a missing one is not.

    Attributes:
        path: the video, below the data set's folder.
        cap: its caption, or several of which one is drawn from the seed.
        num_frames, fps, resolution: what the video is said to be.
        cut: first frame to use, and optionally the frame to stop before.
    """

    path: str
    cap: str | list[str] | None = None
    num_frames: PositiveInt | None = None
    fps: float | None = Field(None, gt=0)
    resolution: Resolution | None = None
    cut: list[FrameNumber] | None = Field(None, min_length=1, max_length=2)

    @property
    def cut_name(self) -> str:
        """`10-50`, or `10-` to the end; `0-` for the whole video."""
        begin, end = [*(self.cut or [0]), None][:2]
        return f"{begin}-{'' if end is None else end}"


@dataclass(frozen=True, slots=True)
class VideoSample:
    """One video, or one cut of it, and its captions.

    Attributes:
        id: stable name, the key of all its random choices: its path below the data set's folder, with `N:` before it
            for the data sets after the first (N = 1, 2, ...), and `//` and its cut after it where the video was listed
            before; so that adding a data set or a row renames nothing.
        file: the video itself.
        captions: at least one.
        annotation: the row as it was given, without the columns.
        columns: what stands in the task's columns, by name.
    """

    id: str
    file: Path
    captions: tuple[str, ...]
    annotation: Annotation
    columns: Mapping[str, float] = field(default_factory=dict)

    def caption(self, seed: int) -> str:
        """The caption that is used: the only one, or one of several drawn from the seed."""
        if len(self.captions) == 1:
            return self.captions[0]
        draw = torch.randint(len(self.captions), (), generator=generator(seed, "caption_choice", self.id, 0))
        return self.captions[int(draw)]


class Listed:
    """The rows of some annotation files so far: gives each sample its id, and knows what was listed before.

    Attributes:
        columns: those that the task declares, which every row has.
    """

    def __init__(self, columns: Sequence[Column] = ()) -> None:
        self.columns = columns
        self._not_used = UNUSED_COLUMNS | ALL_COLUMNS - {column.name for column in columns}
        self._rows: dict[tuple[str, str, tuple[str, ...]], str] = {}  # video, cut and captions: where
        self._ids: dict[str, str] = {}
        self._folders: dict[Path, str] = {}
        self._unused: set[tuple[Path, str]] = set()

    def add(self, source: DataSource, name: str, row: Annotation, captions: tuple[str, ...], place: str) -> str:
        """The id of a row's sample.

        A video is known by the path that is written; where a link leads does not matter.

        Args:
            source: its data set. name: the id of a video that is listed once.
            row, captions: what the row says. place: how to call it.

        Raises:
            DataError: DATA-064 for a row that says what one before it said.
        """
        if source.folder not in self._folders:
            self._folders[source.folder] = os.path.realpath(source.folder)
        video = os.path.join(self._folders[source.folder], os.path.normpath(row.path))
        what = video, row.cut_name, captions
        names = (name, f"{name}//{row.cut_name}", f"{name}//{row.cut_name}//{text_hash(json.dumps(captions))}")
        free = [name for name in names if name not in self._ids]
        if what in self._rows or not free:
            before = self._rows.get(what) or self._ids[name]
            message = f"{place}: {row.path} is listed before, with this cut and caption, in {before}."
            raise DataError("DATA-064", message, "Keep one of the two rows.")
        self._rows[what] = self._ids[free[0]] = place
        return free[0]

    def without_unused(self, values: Any, annotation: Path) -> Any:
        """A row without the columns that nothing depends on; the log says once for each file which they are."""
        unused = self._not_used & values.keys() if isinstance(values, dict) else frozenset()
        new = sorted(column for column in unused if (annotation, column) not in self._unused)
        if new:
            log.info("%s: nothing here depends on the columns %s; they are left out", annotation, ", ".join(new))
            self._unused |= {(annotation, column) for column in new}
        return {name: value for name, value in values.items() if name not in unused} if unused else values


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """One row of an annotation file, checked.

    Attributes:
        source, number: which data set (0, 1, ...) and which row of it (1, 2, ...).
        place: how to call the row in messages.
        sample: what it describes; None where that cannot be told.
        problems: DATA-001 for a missing video; DATA-061 to DATA-064 for the row itself.
    """

    source: int
    number: int
    place: str
    sample: VideoSample | None
    problems: tuple[Problem, ...]


def check_rows(sources: Sequence[DataSource], columns: Sequence[Column] = ()) -> list[CheckedRow]:
    """Check every row of all data sets, in order, and keep what is wrong beside each.

    Args:
        sources: the data sets. columns: of the task.

    Raises:
        DataError: DATA-060 for an annotation file that cannot be read.
    """
    rows: list[CheckedRow] = []
    listed = Listed(columns)
    for source_number, source in enumerate(sources):
        for number, values in enumerate(read_rows(source.annotation, "DATA-060"), start=1):
            rows.append(check_row(values, source_number, number, source, listed))
    return rows


def check_row(values: Any, source_number: int, number: int, source: DataSource, listed: Listed) -> CheckedRow:
    """Check one row.

    Args:
        values: the row.
        source_number, number: its place, as in `CheckedRow`.
        source: its data set.
        listed: the rows before it; it is added.
    """
    place = f"{source.annotation} row {number}"
    prefix = f"{source_number}:" if source_number else ""
    rest, columns, of_columns = _taken_columns(listed.without_unused(values, source.annotation), listed.columns, place)
    try:
        annotation = parse(Annotation, rest, place)
    except ConfigError as error:
        wrong = tuple(Problem("DATA-061", problem.message, problem.remedy) for problem in error.problems)
        return CheckedRow(source_number, number, place, None, (*wrong, *of_columns, *_other_names(values, place)))
    captions = (annotation.cap,) if isinstance(annotation.cap, str) else tuple(annotation.cap or ())
    problems = [*of_columns, *_caption_problems(captions, place)]
    sample = None
    try:
        file = path_below(source.folder, annotation.path, place)
        name = listed.add(source, prefix + os.path.normpath(annotation.path), annotation, captions, place)
        sample = VideoSample(name, file, captions, annotation, columns)
        require_regular_file(file, place)
    except DataError as error:
        problems += error.problems
    return CheckedRow(source_number, number, place, sample, tuple(problems))


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


def _other_names(values: Any, place: str) -> list[Problem]:
    """Problems of columns with other tools' names, where those of here are missing; the remedy is the name here."""
    given = values if isinstance(values, dict) else {}
    return [
        Problem("DATA-061", f'{place}: "{other}" is not read.', f'Call the column "{name}".')
        for other, name in OTHER_NAMES.items()
        if other in given and name not in given
    ]


def _caption_problems(captions: Sequence[str], place: str) -> list[Problem]:
    if not captions:
        return [Problem("DATA-062", f"{place}: the caption (cap) is missing.", 'Add it; "" is a valid caption.')]
    problems = []
    for caption in captions:
        if len(caption) > MAX_CAPTION_CHARACTERS:
            message = f"{place}: a caption has {len(caption)} characters, at most {MAX_CAPTION_CHARACTERS} are read."
            problems.append(Problem("DATA-062", message, "Shorten it; 512 tokens of it would be used."))
    return problems
