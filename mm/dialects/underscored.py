"""Command lines of systems that spell their flags with underscores: `--learning_rate`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from mm.config.flags import Flags, flag_name, parse_flag_parts
from mm.dialects.meaning import Refused, Taken, given, name_of
from mm.errors import Problem

FlagsT = TypeVar("FlagsT", bound=Flags)


class ReadFlags(NamedTuple):
    """Problems of a command line, and lines for the log: what in it changes nothing."""

    problems: list[Problem]
    notes: list[str]


def read_flags(kind: type[FlagsT], argv: Sequence[str], program: str, refused: str) -> tuple[FlagsT, ReadFlags]:
    """A command line, of which what cannot be read is `UNREAD`.

    Args:
        kind: its flags, each made by a function of `mm.dialects.meaning`. argv: the words. program: their command.
        refused: error id of flags whose effect is not to be had.
    """
    spelling = {name_of(field): flag_name(field) for field in kind.model_fields}
    flags, problems = parse_flag_parts(kind, argv, program=program, spelling=spelling)
    theirs = {dashed: own for own, dashed in spelling.items()}
    told, notes = [_spelled(problem, theirs) for problem in problems], list[str]()
    for field, meaning in given(flags):
        if isinstance(meaning, Taken):
            notes.append(f"{name_of(field)} changes nothing: {meaning.why}")
        elif isinstance(meaning, Refused):
            told.append(Problem(refused, f"{name_of(field)} {meaning.why}.", meaning.remedy))
    return flags, ReadFlags(told, notes)


def _spelled(problem: Problem, spelling: Mapping[str, str]) -> Problem:
    """A problem with the flags in it as their system spells them."""
    message, remedy = (
        re.sub(r"--[\w-]+", lambda found: spelling.get(found[0], found[0]), text)
        for text in (problem.message, problem.remedy)
    )
    return Problem(problem.id, message, remedy)
