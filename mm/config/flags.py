"""Command-line flags as a configuration section: one typed field a flag, all problems reported at once.

`--micro-batch-size 2` is the field `micro_batch_size`; a `bool` field is a switch, present or absent; a list field
takes several words. Values may be given as `--flag value` or `--flag=value`; the last one counts, so that a script's
own flags can be overridden by what follows them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import ConfigDict, ValidationError

from mm.config.base import Section, closest, hint, validation_problems
from mm.config.flag_help import REQUIRED, flag_groups
from mm.config.other_names import name_here
from mm.config.unread import UNREAD, Place, Unread, readable
from mm.errors import ConfigError, Problem, raise_all


class Flags(Section):
    """Base of the flags of one command. Values arrive as text, so numbers and paths are read from it.

    Attributes:
        may_be_empty: fields whose value may be the empty text; a script's unset variable must not be taken for a path.
        groups: headings of the help, each by the first field below it; a heading may begin again.
        underscores: flags are spelled as their fields are, `--micro_batch_size`.
    """

    may_be_empty: ClassVar[frozenset[str]] = frozenset()
    groups: ClassVar[Mapping[str, str]] = {}
    underscores: ClassVar[bool] = False
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    @classmethod
    def spelled(cls, field: str) -> str:
        """The flag of a field."""
        return f"--{field}" if cls.underscores else flag_name(field)


FlagsT = TypeVar("FlagsT", bound=Flags)


class _Parser(argparse.ArgumentParser):
    """argparse that reports through our errors instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError("CFG-006", f"The command line cannot be read: {message}.", "See --help.")


def parse_flags(
    flags: type[FlagsT],
    argv: Sequence[str],
    *,
    program: str,
    retired: Mapping[str, str] | None = None,
    spelling: Mapping[str, str] | None = None,
) -> FlagsT:
    """Read `argv` into `flags`.

    Args:
        flags: the command's flags; its docstring is the text of `--help`, a field's `description` the flag's.
        argv: the words after the program's name.
        program: what `--help` calls the command.
        retired: flags of other systems (with their dashes) that mean nothing here, each with what to do instead.
        spelling: other spellings of a flag's dashed name, `{"--source_path": "--source-path"}`.

    Raises:
        ConfigError: CFG-006 for words that are no flag, CFG-007 for an unknown flag, CFG-008 for a retired one,
            CFG-004 and CFG-005 for a missing or wrong value; all at once.
    """
    result, problems = parse_flag_parts(flags, argv, program=program, retired=retired, spelling=spelling)
    raise_all(ConfigError, problems)
    return result


def parse_flag_parts(
    flags: type[FlagsT],
    argv: Sequence[str],
    *,
    program: str,
    retired: Mapping[str, str] | None = None,
    spelling: Mapping[str, str] | None = None,
) -> tuple[FlagsT, list[Problem]]:
    """Read `argv` as `parse_flags` does, and keep what can be read.

    Returns:
        The flags, with `mm.config.unread.UNREAD` for those that are missing, wrong, or meant by a mistyped one; and
        what is wrong.
    """
    values, rest, problems = _values(_build_parser(flags, program), flags.model_fields, _respell(argv, spelling or {}))
    unread = {name for name, value in values.items() if isinstance(value, Unread)}
    values = {name: value for name, value in values.items() if name not in unread}
    unsure: set[Place] = {(name,) for name in unread}
    known = {flags.spelled(field): field for field in flags.model_fields}
    problems += _unknown(rest, list(known), retired or {})
    unsure |= {(name,) for name in _meant(rest, known, retired or {}) if name not in values}
    for name, value in values.items():
        if name not in flags.may_be_empty and (value == "" or (isinstance(value, list) and "" in value)):
            problems.append(Problem("CFG-005", f"{flags.spelled(name)} is empty.", "Give it a value, or leave it out."))
            unsure.add((name,))
    try:
        checked = flags.model_validate(values)
        return (readable(flags, values, unsure) if unsure else checked), problems
    except ValidationError as error:
        places = [tuple(item["loc"][:1]) for item in error.errors(include_url=False)]
        told = zip(places, validation_problems(flags, error, "command line"), strict=True)
        problems += [_as_flag(problem, flags) for place, problem in told if not unread.intersection(place)]
        return readable(flags, values, unsure.union(places)), problems


def _values(
    parser: argparse.ArgumentParser, fields: Iterable[str], words: Sequence[str]
) -> tuple[dict[str, Any], list[str], list[Problem]]:
    """Values by field, words that no flag takes, and the flags that cannot be read at all, which are unread."""
    unread: dict[str, Any] = {}
    problems: list[Problem] = []
    while True:
        try:
            namespace, rest = parser.parse_known_args(list(words))
            return vars(namespace) | unread, rest, problems
        except ConfigError as error:
            problems += error.problems
            found = re.search(r"argument (--[\w-]+):", str(error))
            field = found[1].removeprefix("--").replace("-", "_") if found is not None else ""
            if found is None or field in unread:
                return dict.fromkeys(fields, UNREAD), [], problems
            unread[field] = UNREAD
            words = without_flags(words, {found[1]})


def without_flags(words: Sequence[str], flags: Set[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in flags
        if not dropping:
            kept.append(word)
    return kept


def flag_name(field: str) -> str:
    """`micro_batch_size` -> `--micro-batch-size`."""
    return "--" + field.replace("_", "-")


def _build_parser(flags: type[Flags], program: str) -> argparse.ArgumentParser:
    groups = flag_groups(flags)
    required = [flag for group in groups.values() for flag in group if flag.default == REQUIRED]
    usage = " ".join([program, *(f"{flags.spelled(flag.field)} {flag.value}" for flag in required), "[flags]"])
    parser = _Parser(
        prog=program, usage=usage, description=flags.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for heading, group in groups.items():
        section = parser.add_argument_group(heading)
        for flag in group:
            help_text = flag.description.replace("%", "%%")
            if flag.remark:
                help_text += f" ({flag.remark})"
            if not flag.value:
                section.add_argument(flags.spelled(flag.field), action="store_true", help=help_text)
            elif flag.several:
                section.add_argument(
                    flags.spelled(flag.field), nargs="+", metavar=_one_word(flag.value), help=help_text
                )
            else:
                section.add_argument(flags.spelled(flag.field), metavar=flag.value, help=help_text)
    return parser


def _one_word(value: str) -> str:
    """A short name for one of several values, which the help shows twice."""
    return "WORD" if "|" in value else value


def _respell(argv: Sequence[str], spelling: Mapping[str, str]) -> list[str]:
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append(spelling.get(name, name) + equals + value if word.startswith("--") else word)
    return words


def _unknown(rest: Sequence[str], known: list[str], retired: Mapping[str, str]) -> list[Problem]:
    problems = []
    after_unknown = False
    for word in rest:
        name = word.split("=")[0]
        if not word.startswith("--"):
            if not after_unknown:
                problems.append(Problem("CFG-006", f'"{word}" belongs to no flag.', "Remove it or name its flag."))
            continue
        after_unknown = True  # the words behind an unknown flag are its values, not further mistakes
        if name in retired:
            problems.append(Problem("CFG-008", f"{name} has no effect here.", retired[name]))
        elif (here := name_here(name, dict.fromkeys(known))) is not None:
            message = f"{name} is not a flag; the one for that here is {here}."
            problems.append(Problem("CFG-007", message, f"Give {here}; --help says what it takes."))
        else:
            found = f"{name} is not a flag.{hint(name, known)}"
            problems.append(Problem("CFG-007", found, "Correct or remove it; see --help."))
    return problems


def _meant(rest: Sequence[str], known: Mapping[str, str], retired: Mapping[str, str]) -> set[str]:
    """The fields that mistyped flags, and flags by another system's name, stand for."""
    names = {word.split("=")[0] for word in rest if word.startswith("--")} - retired.keys()
    return {known[here] for name in names if (here := name_here(name, known) or closest(name, list(known)))}


def _as_flag(problem: Problem, flags: type[Flags]) -> Problem:
    """Say `--micro-batch-size` where a file's message would say "micro_batch_size"."""
    message = problem.message
    place = re.search(r'"([^".]+)[^"]*"', message)  # the first in quotes; a value, which comes later, may look alike
    if place is not None and place[1] in flags.model_fields:
        message = message[: place.start()] + flags.spelled(place[1]) + message[place.end() :]
    message = message.replace("command line lacks the key", "The command line lacks").replace("command line: ", "")
    return Problem(problem.id, message, problem.remedy.replace("Add it.", "Give the flag; see --help."))


def words_of_process() -> list[str]:
    """The command line's words without the program's name."""
    return sys.argv[1:]


def as_words(values: Mapping[str, Any]) -> list[str]:
    """The inverse of `parse_flags` for building a command line in Python: `{"lr": 1e-3, "bf16": True}`."""
    words: list[str] = []
    for name, value in values.items():
        if value is True:
            words.append(flag_name(name))
        elif isinstance(value, (list, tuple)):
            words += [flag_name(name), *map(str, value)]
        elif value is not False and value is not None:
            words += [flag_name(name), str(value)]
    return words
