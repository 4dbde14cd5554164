"""Reading a command's words and files: what is wrong and what is taken, gathered, so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from mm.config.base import Section, load_json, take_retired
from mm.config.flags import Flags, parse_flag_parts
from mm.config.unread import UNREAD, Unread, UnreadError, parse_parts
from mm.dialects.mindspeed.accepted import Kind, Note, said, settle
from mm.dialects.mindspeed.accepted_flags import Accepted, take_accepted
from mm.errors import ConfigError, Problem, raise_all

SectionT = TypeVar("SectionT", bound=Section)
FlagsT = TypeVar("FlagsT", bound=Flags)
ReadT = TypeVar("ReadT")


class Reading:
    """Notes and problems that one command's words and files gave beside their values.

    Attributes:
        problems: what is wrong.
        notes: what is said that is how it is done here anyway, and what goes by another name here, by file.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: dict[str, list[Note]] = {}

    def attempt(self, read: Callable[[], ReadT]) -> ReadT:
        """Result of a reading function, or `UNREAD`, where its problems are kept or what it needs was not read."""
        try:
            return read()
        except ConfigError as error:
            self.problems += error.problems
        except UnreadError:  # of which the user is told already
            pass
        unread: ReadT = UNREAD
        return unread

    def flags(
        self,
        kind: type[FlagsT],
        argv: Sequence[str],
        program: str,
        *,
        accepted: Accepted,
        retired: Mapping[str, str],
    ) -> FlagsT:
        """A command line, of which what cannot be read is `UNREAD`."""
        words, notes = take_accepted(argv, accepted)
        self.notes["flags"] = notes
        result, problems = parse_flag_parts(kind, words, program=program, retired=retired)
        self.problems += problems
        return result

    def file(
        self, section: type[SectionT], path: str, kind: Kind, retired: Mapping[str, str] | None = None
    ) -> SectionT:
        """A JSON file, of which what cannot be read is `UNREAD`.

        Args:
            section: its type. path: `UNREAD` where no flag says it. kind: of file.
            retired: keys that mean nothing here, with what to do instead.
        """
        return self.attempt(partial(self._file, section, path, kind, retired or {}))

    def _file(self, section: type[SectionT], path: str, kind: Kind, retired: Mapping[str, str]) -> SectionT:
        values, found = settle(load_json(Path(path)), kind)
        self.notes.setdefault(path, []).extend(found)
        self.problems += take_retired(values, retired, path)
        result, problems = parse_parts(section, values, path)
        self.problems += problems
        return result

    def told(self) -> tuple[str, ...]:
        """The notes, as lines for the log."""
        return tuple(said(file, found) for file, found in self.notes.items() if found)


def alone(read: Callable[[Reading], SectionT], notes: list[Note] | None = None) -> SectionT:
    """One file read by itself.

    Args:
        read: reads it. notes: gets what is taken as it is done here anyway, and what goes by another name here.

    Raises:
        ConfigError: with all that is wrong in it.
    """
    reading = Reading()
    result = read(reading)
    raise_all(ConfigError, reading.problems)
    assert not isinstance(result, Unread)  # noqa: S101  a file that is not read is a problem
    if notes is not None:
        notes += [note for found in reading.notes.values() for note in found]
    return result
