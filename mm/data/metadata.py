"""Annotations of a raw data set: every row checked before any work begins.

The format is MindSpeed-MM's data.json: rows of `path`, `cap` and, optionally, `num_frames`, `fps`, `resolution` and
`cut`. What the optional fields say is compared with the video when it is read (mm/data/clips.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from mm.config.base import Section, parse
from mm.config.data import DataSource
from mm.data.files import raise_limited, read_rows, require_regular_file, resolve_inside
from mm.errors import ConfigError, DataError, Problem
from mm.rng import generator

MAX_CAPTION_CHARACTERS = 65536  # far beyond 512 tokens; longer is a mistake in the file, and slow to tokenise

PositiveInt = Annotated[int, Field(ge=1)]


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
    cut: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=1, max_length=2)


@dataclass(frozen=True, slots=True)
class VideoSample:
    """One video and its captions.

    Attributes:
        id: stable name, the key of all its random choices: its path below the data set's folder, with `N:` before it
            for the data sets after the first (N = 1, 2, ...), so that adding a data set renames nothing.
        file: the video itself.
        captions: at least one.
        annotation: the row as it was given.
    """

    id: str
    file: Path
    captions: tuple[str, ...]
    annotation: Annotation

    def caption(self, seed: int) -> str:
        """The caption that is used: the only one, or one of several drawn from the seed."""
        if len(self.captions) == 1:
            return self.captions[0]
        draw = torch.randint(len(self.captions), (), generator=generator(seed, "caption_choice", self.id, 0))
        return self.captions[int(draw)]


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


def load_samples(sources: Sequence[DataSource]) -> list[VideoSample]:
    """Read and check the annotations of all data sets, in order.

    Raises:
        DataError: DATA-060 for an annotation file that cannot be read, DATA-061 for a row of the wrong form, DATA-062
            for a missing or unusable caption, DATA-063 for an unsafe path, DATA-001 for a missing video, DATA-064 for
            a video listed twice; all rows' problems at once (DATA-060 stops earlier).
    """
    rows = check_rows(sources)
    raise_limited([problem for row in rows for problem in row.problems])
    return [row.sample for row in rows if row.sample is not None]


def check_rows(sources: Sequence[DataSource]) -> list[CheckedRow]:
    """Check every row of all data sets, in order, and keep what is wrong beside each.

    Raises:
        DataError: DATA-060 for an annotation file that cannot be read.
    """
    rows: list[CheckedRow] = []
    first_place: dict[Path, str] = {}
    for source_number, source in enumerate(sources):
        for number, values in enumerate(read_rows(source.annotation, "DATA-060"), start=1):
            rows.append(check_row(values, source_number, number, source, first_place))
    return rows


def check_row(
    values: Any, source_number: int, number: int, source: DataSource, first_place: dict[Path, str]
) -> CheckedRow:
    """Check one row.

    Args:
        values: the row.
        source_number, number: its place, as in `CheckedRow`.
        source: its data set.
        first_place: where each video was listed first; the row's is added.
    """
    place = f"{source.annotation} row {number}"
    prefix = f"{source_number}:" if source_number else ""
    try:
        annotation = parse(Annotation, values, place)
    except ConfigError as error:
        wrong = tuple(Problem("DATA-061", problem.message, problem.remedy) for problem in error.problems)
        return CheckedRow(source_number, number, place, None, wrong)
    captions = [annotation.cap] if isinstance(annotation.cap, str) else annotation.cap or []
    problems = list(_caption_problems(captions, place))
    sample = None
    try:
        file = resolve_inside(source.folder, annotation.path, place)
        sample = VideoSample(prefix + os.path.normpath(annotation.path), file, tuple(captions), annotation)
        require_regular_file(file, place)
    except DataError as error:
        problems += error.problems
    if sample is not None and not problems and (before := first_place.setdefault(sample.file, place)) != place:
        message = f"{place}: {sample.file} is listed before, in {before}."
        problems.append(Problem("DATA-064", message, 'Keep one row; several captions go into a list, "cap".'))
    return CheckedRow(source_number, number, place, sample, tuple(problems))


def _caption_problems(captions: Sequence[str], place: str) -> list[Problem]:
    if not captions:
        return [Problem("DATA-062", f"{place}: the caption (cap) is missing.", 'Add it; "" is a valid caption.')]
    problems = []
    for caption in captions:
        if len(caption) > MAX_CAPTION_CHARACTERS:
            message = f"{place}: a caption has {len(caption)} characters, at most {MAX_CAPTION_CHARACTERS} are read."
            problems.append(Problem("DATA-062", message, "Shorten it; 512 tokens of it would be used."))
    return problems
