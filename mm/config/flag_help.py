"""A command's flags in words, for --help and docs/flags.md: their groups, what each takes, its default."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

REQUIRED = "required"
_UNGROUPED = "flags"
_KINDS = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}
_BOUNDS = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))


@dataclass(frozen=True)
class FlagText:
    """A flag in words.

    Attributes:
        field: its field. value: what it takes, such as `INT` or `full|selective`; empty for a switch.
        several: whether it takes one value or more. bounds: of a number, such as "at least 1"; empty without.
        default: as it would be written; "required" where it must be given, empty where nothing stands for it.
        description: what it is for.
    """

    field: str
    value: str
    several: bool
    bounds: str
    default: str
    description: str

    @property
    def remark(self) -> str:
        """Bounds and default, as one puts them in parentheses."""
        default = f"default: {self.default}" if self.default not in ("", REQUIRED) else self.default
        return "; ".join(part for part in (self.bounds, default) if part)


def flag_groups(flags: type[BaseModel]) -> dict[str, list[FlagText]]:
    """Flags of a command under the headings of its help, in the order in which the headings first occur.

    Args:
        flags: a class of flags. It and its bases have in `groups` the fields at which a heading begins.
    """
    beginnings: dict[str, str] = {}
    for base in reversed(flags.__mro__):
        beginnings |= base.__dict__.get("groups", {})
    result: dict[str, list[FlagText]] = {}
    heading = _UNGROUPED
    for name, field in flags.model_fields.items():
        heading = beginnings.get(name, heading)
        result.setdefault(heading, []).append(_flag_text(name, field))
    return result


def _flag_text(name: str, field: FieldInfo) -> FlagText:
    several, value = _value(field.annotation)
    return FlagText(name, value, several, ", ".join(_bounds(field.metadata)), _default(field), field.description or "")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    if field.default is None or field.default is False or field.default == []:
        return ""
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def _value(annotation: Any) -> tuple[bool, str]:
    """Tell whether a flag takes several values, and what it takes."""
    kind = _without_none(annotation)
    if get_origin(kind) is Annotated:
        return _value(get_args(kind)[0])
    if get_origin(kind) in (list, tuple):
        return True, _value(get_args(kind)[0])[1]
    if kind is bool:
        return False, ""
    if get_origin(kind) is Literal:
        return False, "|".join(map(str, get_args(kind)))
    return False, _KINDS[kind]


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(annotation) if part is not type(None))
        return kind
    return annotation


def _bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for item in metadata:
        for kind, attribute, words in _BOUNDS:
            if isinstance(item, kind):
                yield f"{words} {getattr(item, attribute)}"
