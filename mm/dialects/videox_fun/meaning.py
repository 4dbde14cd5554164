"""The meaning here of a flag of VideoX-Fun, said at the flag's own field.

learning_rate: float = used("optimizer.lr", default=1e-4)
noise_offset: str | None = taken("no trainer reads it")
use_came: bool = refused("the optimizer CAME is not here", "Remove it: the optimizer is AdamW.", False)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from mm.config.flags import Flags
from mm.config.run.origins import Word
from mm.config.unread import Unread

_KEY = "meaning"


@dataclass(frozen=True)
class Used:
    """A flag that values follow from.

    Attributes:
        paths: the values of the training or the extraction that it is the word of.
    """

    paths: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """A flag that changes nothing: because nothing reads it there, or because what it is about is done otherwise here.

    Attributes:
        why: behind its name, in the log.
    """

    why: str


@dataclass(frozen=True)
class Refused:
    """A flag whose effect is not to be had. why: behind its name. remedy: what to do instead."""

    why: str
    remedy: str


Meaning = Used | Taken | Refused


def used(*paths: str, default: Any = None, **constraints: Any) -> Any:
    """Field of a flag that these values are set by."""
    return Field(default, json_schema_extra={_KEY: Used(paths)}, **constraints)  # type: ignore[dict-item]


def taken(why: str, default: Any = None) -> Any:
    """Field of a flag that is noted where it is given."""
    return Field(default, json_schema_extra={_KEY: Taken(why)})  # type: ignore[dict-item]


def refused(why: str, remedy: str, default: Any = None) -> Any:
    """Field of a flag that is an error where it is given."""
    return Field(default, json_schema_extra={_KEY: Refused(why, remedy)})  # type: ignore[dict-item]


def name_of(field: str) -> str:
    """`--learning_rate`, of the field."""
    return f"--{field}"


def meanings(flags: type[Flags]) -> Iterator[tuple[str, Meaning]]:
    """Every field of a script's flags, with its meaning."""
    for field, info in flags.model_fields.items():
        found = info.json_schema_extra.get(_KEY) if isinstance(info.json_schema_extra, dict) else None
        assert isinstance(found, (Used, Taken, Refused))  # noqa: S101  every field is made by the functions above
        yield field, found


def given(flags: Flags) -> Iterator[tuple[str, Meaning]]:
    """The flags of a command line that are there and could be read; False of a switch is that it is not there."""
    for field, meaning in meanings(type(flags)):
        value = getattr(flags, field)
        if field in flags.model_fields_set and value is not False and not isinstance(value, Unread):
            yield field, meaning


def words_of(flags: type[Flags]) -> dict[str, Word]:
    """The word of each value, by its path; the first flag that names a path has it."""
    found: dict[str, Word] = {}
    for field, meaning in meanings(flags):
        for path in meaning.paths if isinstance(meaning, Used) else ():
            found.setdefault(path, Word(name_of(field)))
    return found
