"""Reading of one command: what is wrong in its words, files and environment, and what is noted, gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mm.config.flags import parse_flag_parts
from mm.config.unread import UNREAD, UnreadError
from mm.dialects.meaning import Refused, Taken, given, name_of
from mm.dialects.videox_fun.flags import VideoxFlags
from mm.dialects.videox_fun.scripts import SCRIPTS, Script
from mm.errors import MMError, Problem

ReadT = TypeVar("ReadT")


class Reading:
    """Problems, and lines for the log, in the order in which they are found."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[str] = []

    def attempt(self, read: Callable[[], ReadT]) -> ReadT:
        """Result of a reading function, or `UNREAD`, where its problems are kept or what it needs was not read."""
        try:
            return read()
        except MMError as error:
            self.problems += error.problems
        except UnreadError:  # of which the user is told already
            pass
        unread: ReadT = UNREAD
        return unread

    def wrong(self, error_id: str, found: str, remedy: str) -> None:
        """Keep a problem."""
        self.problems.append(Problem(error_id, found, remedy))

    def flags(self, script: Script, argv: Sequence[str]) -> VideoxFlags:
        """A script's words, of which what cannot be read is `UNREAD`.

        Notes what changes nothing, and keeps CFG-340 for flags of another script and CFG-341 for what is not to be had.
        """
        fields = script.flags.model_fields
        elsewhere = {
            name_of(field): f"Remove it; it is a flag of {other.path}."
            for other in SCRIPTS.values()
            for field in other.flags.model_fields
            if field not in fields
        }
        result, problems = parse_flag_parts(script.flags, argv, program=script.path, retired=elsewhere)
        self.problems += problems
        for field, meaning in given(result):
            if isinstance(meaning, Taken):
                self.notes.append(f"{name_of(field)} changes nothing: {meaning.why}")
            elif isinstance(meaning, Refused):
                self.wrong("CFG-341", f"{name_of(field)} {meaning.why}.", meaning.remedy)
        return result
