"""Rows to generate: prompts from a text file, and what belongs to them from others.

A row that cannot be used does not keep the others from being generated: it is reported, and the run ends with an error
when the others are done.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mm.config.inputs import missing_parts
from mm.config.path_line import LineError, read_paths
from mm.config.run.generation import GenerationRun
from mm.config.run.listed import LISTS, Listed
from mm.config.tasks.task import ListName, Task
from mm.data.text_lines import read_lines, read_prompts
from mm.errors import DataError, Problem, raise_all
from mm.generate.camera_line import is_move

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


@dataclass(frozen=True)
class GenerationRow:
    """One clip to make.

    Attributes:
        index: its number, which names the clip and keys its noise.
        prompt: what it shows.
        files: what stands in its lines of the lists, by the list's name; not those whose line is blank.
        columns: the task's numbers, by name.
    """

    index: int
    prompt: str
    files: Mapping[ListName, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[str, float] = field(default_factory=dict)

    def paths(self, name: ListName) -> tuple[Path, ...]:
        """Paths of one list."""
        return tuple(map(Path, self.files.get(name, ())))

    def path(self, name: ListName) -> Path | None:
        """The path of a list of which each line has one at most."""
        return next(iter(self.paths(name)), None)

    @property
    def camera(self) -> str | None:
        """The pose file, or the direction and its speed."""
        return next(iter(self.files.get("cameras", ())), None)


def row_kind(task: Task, row: GenerationRow) -> tuple[int, bool]:
    """`mm.generate.sources.kind_of_clip` of a row's clip, told from its files alone."""
    in_front = sum(len(row.files.get(media.listed, ())) for media in task.media if media.in_front)
    return in_front, bool(task.first_frame_share) and bool(row.files.get("images"))


@dataclass(frozen=True)
class BadRow:
    """A row that no clip can be made of."""

    index: int
    problem: Problem


def read_rows(run: GenerationRun) -> tuple[list[GenerationRow], list[BadRow]]:
    """The rows of the configured files, those that can be used and those that cannot.

    Prompts that go with images, videos or numbers are matched line by line; a line that is blank in all files is left
    out.

    Raises:
        DataError: DATA-053 when a file cannot be read as UTF-8 text, DATA-054 when it holds nothing, DATA-084 when
            there are not as many images or videos as prompts.
    """
    lists = _lists(run)
    if not lists:
        return [GenerationRow(index, prompt) for index, prompt in enumerate(read_prompts(Path(run.inputs.prompts)))], []
    good, bad = _matched(run, lists)
    log.info("%s: %d rows with %s", run.inputs.prompts, len(good) + len(bad), ", ".join(lists.values()))
    return good, bad


def _lists(run: GenerationRun) -> dict[str, str]:
    """The files that go with the prompts, by the list's name or the column's."""
    return dict((*run.inputs.lists.items(), *run.inputs.columns.items()))


def _word(name: str) -> str:
    """Word for a line of a list: an image, or a column's number."""
    return name.removesuffix("s").replace("_", "-") if name in LISTS else name


def _matched(run: GenerationRun, lists: Mapping[str, str]) -> tuple[list[GenerationRow], list[BadRow]]:
    """`read_rows` where other files go with the prompts."""
    prompts = read_lines(Path(run.inputs.prompts), "prompt")
    lines = {}
    for name, file in lists.items():
        listed = run.row_lists.get(name) if name in LISTS else None
        others = read_lines(Path(file), _word(name), may_end_blank=listed is not None and not listed.fewest)
        while len(others) > len(prompts) and not others[-1]:
            others.pop()
        lines[name] = others
    for name, others in lines.items():
        if len(prompts) != len(others):
            raise DataError(
                "DATA-084",
                f"{run.inputs.prompts} has {len(prompts)} lines, and {lists[name]} {len(others)}.",
                f"Write one {_word(name)} for each prompt, in the same order.",
            )
    together = [row for row in zip(prompts, *lines.values(), strict=True) if any(row)]
    good, bad = [], []
    for index, (prompt, *others) in enumerate(together):
        row = _row(index, prompt, dict(zip(lines, others, strict=True)), run)
        if isinstance(row, GenerationRow):
            good.append(row)
        else:
            bad.append(row)
    return good, bad


def require_inputs(run: GenerationRun) -> None:
    """Refuse a generation of which nothing can come, because files are not there; nothing is loaded.

    Rows of which only some lack their images are no reason: the others are generated.

    Raises:
        DataError: what `read_rows` and `mm.config.inputs.missing_parts` say, DATA-001 when every row's images or video
            are missing; all at once.
    """
    problems = missing_parts(run)
    lists = _lists(run)
    try:
        if not lists:
            read_lines(Path(run.inputs.prompts), "prompt")
        else:
            good, bad = _matched(run, lists)
            missing = [problem for row in good for problem in _missing_files(row)[:1]]
            if len(missing) == len(good):  # none is left, also where none had a file to miss
                problems += [*(row.problem for row in bad), *missing]
    except DataError as error:
        problems += error.problems
    raise_all(DataError, problems)


def _missing_files(row: GenerationRow) -> list[Problem]:
    files = [path for name, paths in row.files.items() for path in paths if name != "cameras" or not is_move(path)]
    remedy = "Correct the path, or add the file."
    return [
        Problem("DATA-001", f"Row {row.index}: {file} does not exist.", remedy)
        for file in files
        if not os.path.exists(file)
    ]


def _row(index: int, prompt: str, others: Mapping[str, str], run: GenerationRun) -> GenerationRow | BadRow:
    """A row, or why it is none (DATA-085)."""
    if not prompt:
        return _bad(index, "no prompt", "Write one, or remove both lines.")
    files: dict[ListName, tuple[str, ...]] = {}
    for name, listed in run.row_lists.items():
        if name in others:
            given = _paths(index, name, others[name], listed, run)
            if isinstance(given, BadRow):
                return given
            files[name] = given
    columns: dict[str, float] = {}
    for column in run.row_task.columns:
        text = others[column.name]
        value = float(text) if _NUMBER.fullmatch(text) else None
        if value is None or not column.holds(value):
            found = f'"{text}"' if text else "nothing"
            return _bad(index, f"{found} where {column.name} should be", f"Write {column.expected}.")
        columns[column.name] = value
    return GenerationRow(index, prompt, {name: given for name, given in files.items() if given}, columns)


def _paths(index: int, name: ListName, text: str, listed: Listed, run: GenerationRun) -> tuple[str, ...] | BadRow:
    """The paths of a line."""
    if not text and not listed.fewest:
        return ()
    frames = run.row_task.frames
    what = f"one {_word(name)}" if listed.most == 1 else "two images" if name == "images" else name
    if not text:
        return _bad(index, f"nothing where {what} should be", "Write the path, or remove both lines.")
    counts = range(1, text.count(",") + 2) if listed.most is None else (listed.most,)
    try:
        return read_paths(text, counts, lambda paths: all(map(os.path.isfile, paths)))
    except LineError as error:
        expected = ", ".join(f"{frame.name}.png" for frame in frames) if (listed.most or 1) > 1 else '"a, b.png"'
        remedy = f"Write {expected}; a path with a comma in it goes into double quotes."
        return _bad(index, f'"{text}" where {what} should be; it {error}', remedy)


def _bad(index: int, found: str, remedy: str) -> BadRow:
    return BadRow(index, Problem("DATA-085", f"Row {index} has {found}.", remedy))
