"""Cells of one row of a table, taken by name, with all that is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mm.config.base import hint
from mm.config.tasks.task import Column
from mm.data.files import is_text, path_below
from mm.data.metadata import Kind
from mm.data.remote.media import is_object
from mm.errors import DataError, Problem

VIDEO_ENDINGS = frozenset(
    (".mp4", ".avi", ".mov", ".wmv", ".mkv", ".flv", ".webm", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".vob")
)
"""Endings of videos, lower case: DiffSynth's, the animated ones among them, and what else PyAV reads."""
IMAGE_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"))

MAX_CAPTION_CHARACTERS = 65536  # far beyond 512 tokens; longer is a mistake in the file, and slow to tokenise


class Cells:
    """The cells of one row, taken by name; what is wrong with each is kept, and what nobody takes is a problem.

    A cell that is empty, null or not there is not given. Cells of CSV are text, of which numbers are read.
    """

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        self._values = dict(values)
        self._known = list[str]()
        self._place = place
        self.problems: list[Problem] = []

    def wrong(self, found: str, remedy: str = "Correct the row.", id: str = "DATA-061") -> None:
        """Note a problem; `found` goes on after the row's name."""
        self.problems.append(Problem(id, f"{self._place}{found}", remedy))

    def take(self, name: str) -> Any:
        """A cell as it is, or None."""
        self._known.append(name)
        value = self._values.pop(name, None)
        return None if value == "" else value

    def names(self) -> list[str]:
        """Columns that nobody has taken."""
        return list(self._values)

    def has(self, name: str) -> bool:
        """Tell whether a column is there, with a text that may be empty."""
        return self._values.get(name) is not None

    def text(self, name: str) -> str | None:
        """A text."""
        value = self.take(name)
        if value is None or _is_text(value):
            return value
        self.wrong(f": {name} is {value!r:.80}, and no text.")
        return None

    def path(self, *names: str) -> str | None:
        """The path of the target, in the first of some columns that has one; DATA-061 where none has."""
        given = [(name, text) for name in names if (text := self.text(name)) is not None]
        if given:
            return given[0][1]
        if not self.problems:
            self.wrong(f" has no path in {' or '.join(names)}.", "Add it.")
        return None

    def captions(self, name: str) -> list[str]:
        """One caption or several; an empty text is one. DATA-062 where there is none."""
        self._known.append(name)
        value = self._values.pop(name, None)
        captions = [value] if isinstance(value, str) else value or []
        if not isinstance(captions, list) or not all(map(_is_text, captions)):
            self.wrong(f": {name} is {value!r:.80}, and no text or list of texts.")
            return []
        self.problems += caption_problems(captions, self._place, name)
        return captions

    def number(self, name: str) -> float | None:
        """A number above zero."""
        value = self.take(name)
        number = _as_number(value)
        if value is None or (number is not None and number > 0):
            return number
        self.wrong(f": {name} is {value!r:.80}, and no number above 0.")
        return None

    def count(self, name: str) -> int | None:
        """A whole number above zero."""
        value = self.take(name)
        number = _as_number(value)
        if number is not None and number >= 1 and number.is_integer():
            return int(number)
        if value is not None:
            self.wrong(f": {name} is {value!r:.80}, and no whole number above 0.")
        return None

    def column(self, column: Column) -> float | None:
        """The number in a column of the task."""
        value = self.take(column.name)
        number = _as_number(value)
        if number is not None and column.holds(number):
            return number
        what = f"lacks {column.name}" if value is None else f"has {column.name} {value!r:.80}"
        self.wrong(f" {what}; the task takes {column.expected}.")
        return None

    def files(self, name: str, folder: Path) -> tuple[str, ...]:
        """The path, or the list of paths, of a role; DATA-063 for one that is neither below `folder` nor an object."""
        value = self.take(name)
        texts = [] if value is None else value if isinstance(value, list) else [value]
        if not all(map(_is_text, texts)):
            self.wrong(f": {name} is {value!r:.80}, and no path or list of paths.")
            return ()
        try:
            for text in texts:
                if not is_object(text):
                    path_below(folder, text, f"{self._place}: {name}")
            return tuple(texts)
        except DataError as error:
            self.problems += error.problems
            return ()

    def kind(self, path: str, said: str | None = None) -> Kind:
        """Kind of a file by its ending, which `said` must not contradict; DATA-061 where neither tells."""
        by_ending = kind_of(path)
        if said is not None and by_ending in (None, said):
            return "video" if said == "video" else "image"
        if said is not None:
            self.wrong(f" says that {path} is of the type {said}; its ending is that of the other.")
        elif by_ending is None:
            known = " ".join(sorted(ending[1:] for ending in VIDEO_ENDINGS | IMAGE_ENDINGS))
            self.wrong(f": the ending of {path} is that of no video or image.", f"Give it one of {known}.")
        return by_ending or "video"

    def refuse_the_rest(self) -> None:
        """Note every column that nobody took (DATA-061)."""
        for name in self._values:
            remedy = f"Remove the column.{hint(name, self._known)}"
            self.wrong(f' has the unknown column "{name}".', remedy)


def kind_of(path: str) -> Kind | None:
    """Kind of a file by its ending, in whichever case."""
    ending = PurePosixPath(path).suffix.lower()
    return "video" if ending in VIDEO_ENDINGS else "image" if ending in IMAGE_ENDINGS else None


def caption_problems(captions: Sequence[str], place: str, name: str) -> list[Problem]:
    """Problems (DATA-062) of a row's captions, which stand in the column `name`."""
    if not captions:
        return [Problem("DATA-062", f"{place}: the caption ({name}) is missing.", 'Add it; "" is a valid caption.')]
    problems = []
    for caption in captions:
        if len(caption) > MAX_CAPTION_CHARACTERS:
            message = f"{place}: a caption has {len(caption)} characters, at most {MAX_CAPTION_CHARACTERS} are read."
            problems.append(Problem("DATA-062", message, "Shorten it; 512 tokens of it would be used."))
    return problems


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_text(value)


def _as_number(value: Any) -> float | None:
    """A number, or the one that a text of CSV spells; None for others, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < float("inf") else None
