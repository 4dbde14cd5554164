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


def load_samples(sources: Sequence[DataSource]) -> list[VideoSample]:
    """Read and check the annotations of all data sets, in order.

    Raises:
        DataError: DATA-060 for an annotation file that cannot be read, DATA-061 for a row of the wrong form, DATA-062
            for a missing or unusable caption, DATA-063 for an unsafe path, DATA-001 for a missing video, DATA-064 for
            a video listed twice; all rows' problems at once (DATA-060 stops earlier).
    """
    samples: list[VideoSample] = []
    problems: list[Problem] = []
    first_place: dict[Path, str] = {}
    for number, source in enumerate(sources):
        prefix = f"{number}:" if number else ""
        for index, row in enumerate(read_rows(source.annotation, "DATA-060"), start=1):
            place = f"{source.annotation} row {index}"
            try:
                sample = _sample(row, source.folder, prefix, place)
            except DataError as error:
                problems += error.problems
                continue
            before = first_place.setdefault(sample.file, place)
            if before != place:
                message = f"{place}: {sample.file} is listed before, in {before}."
                problems.append(Problem("DATA-064", message, 'Keep one row; several captions go into a list, "cap".'))
            samples.append(sample)
    raise_limited(problems)
    return samples


def _sample(row: Any, folder: Path, prefix: str, place: str) -> VideoSample:
    problems: list[Problem] = []
    try:
        annotation = parse(Annotation, row, place)
    except ConfigError as error:
        problems = [Problem("DATA-061", problem.message, problem.remedy) for problem in error.problems]
        raise_limited(problems)
        raise
    captions = [annotation.cap] if isinstance(annotation.cap, str) else annotation.cap or []
    problems += _caption_problems(captions, place)
    file = None
    try:
        file = resolve_inside(folder, annotation.path, place)
        require_regular_file(file, place)
    except DataError as error:
        problems += error.problems
    raise_limited(problems)
    assert file is not None  # noqa: S101  its problems were raised
    return VideoSample(prefix + os.path.normpath(annotation.path), file, tuple(captions), annotation)


def _caption_problems(captions: Sequence[str], place: str) -> list[Problem]:
    if not captions:
        return [Problem("DATA-062", f"{place}: the caption (cap) is missing.", 'Add it; "" is a valid caption.')]
    problems = []
    for caption in captions:
        if len(caption) > MAX_CAPTION_CHARACTERS:
            message = f"{place}: a caption has {len(caption)} characters, at most {MAX_CAPTION_CHARACTERS} are read."
            problems.append(Problem("DATA-062", message, "Shorten it; 512 tokens of it would be used."))
    return problems
