"""Checks of a configuration of which some cannot be read.

A typing mistake in a flag and a value that a rule refuses in a file are told in one round: what was read stands in its
place, and `UNREAD` where something was not. Whoever looks at that gets an `UnreadError`, so that a rule which needs it
says nothing, instead of something about a default that nobody asked for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeGuard, TypeVar, Union, get_origin

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from mm.config.base import closest, fields_at, has_tag, plain_place, sections_in, validation_problems
from mm.errors import Problem

Place = tuple[int | str, ...]
"""Where a value is: names of keys and numbers of list items, from outside to inside."""


class UnreadError(Exception):
    """A value was asked for that could not be read, and of which the user is told already."""


class Unread:
    """Stands for a value that could not be read. Its parts cannot be read either; a use of it raises."""

    def _refuse(self, *_: object) -> NoReturn:
        raise UnreadError

    def __getattr__(self, name: str) -> Unread:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object) -> Unread:  # noqa: D102  as its parts
        return self

    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = _refuse
    __str__ = __format__ = __fspath__ = __int__ = __float__ = __index__ = __hash__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = _refuse

    def __repr__(self) -> str:
        return "UNREAD"


UNREAD: Any = Unread()
RunT = TypeVar("RunT")
ValueT = TypeVar("ValueT")
SectionT = TypeVar("SectionT", bound=BaseModel)


def read_or(value: ValueT, other: ValueT) -> ValueT:
    """The value, or another where it could not be read."""
    return other if isinstance(value, Unread) else value


def is_given(value: ValueT | None) -> TypeGuard[ValueT]:
    """Tell whether a value is there that may be left out.

    Raises:
        UnreadError: where that could not be read.
    """
    if isinstance(value, Unread):
        raise UnreadError
    return value is not None


def if_read(make: Callable[[], ValueT]) -> ValueT:
    """Result of `make`, or `UNREAD` where a value that it needs could not be read."""
    try:
        return make()
    except UnreadError:
        unread: ValueT = UNREAD
        return unread


def partly(section: type[SectionT], **known: Any) -> SectionT:
    """A section of which only some values are known."""
    return section.model_construct(**{name: known.get(name, UNREAD) for name in section.model_fields})


def built(section: type[SectionT], values: Mapping[str, Any]) -> SectionT:
    """A section of values that were each read and checked, or could not be read.

    Raises:
        pydantic.ValidationError: for values that the section does not take.
    """
    if any(isinstance(value, Unread) for value in values.values()):
        return section.model_construct(**values)
    return section(**values)


def whole(section: SectionT, names: Iterable[str]) -> SectionT:
    """A section of which these fields were read.

    Raises:
        UnreadError: where one was not.
    """
    if any(isinstance(getattr(section, name), Unread) for name in names):
        raise UnreadError
    return section


def broken(rules: Iterable[Callable[[RunT], Iterator[Problem]]], run: RunT) -> Iterator[Problem]:
    """Problems by the rules that need nothing unread."""
    for rule in rules:
        try:
            yield from rule(run)
        except UnreadError:
            continue


def parse_parts(section: type[SectionT], values: Any, source: str) -> tuple[SectionT, list[Problem]]:
    """Check values as `mm.config.base.parse` does, and keep what can be read.

    Args:
        section: the section's type. values: parsed JSON. source: what to call it in messages.

    Returns:
        The section, with `UNREAD` in the place of what is wrong or missing, or of a key that a slip of the pen hides;
        and what is wrong.
    """
    try:
        return section.model_validate_json(json.dumps(values)), []
    except ValidationError as error:
        problems = validation_problems(section, error, source)
        unsure, known = set(_unsure(section, error, values)), _without_unknown(section, error, values)
        seen = [(item["loc"], item["type"]) for item in error.errors(include_url=False)]
    try:
        result = section.model_validate_json(json.dumps(known))
        if not unsure:
            return result, problems
    except ValidationError as error:  # what unknown keys kept from being looked at
        items = error.errors(include_url=False)
        told = zip(items, validation_problems(section, error, source), strict=True)
        problems += [problem for item, problem in told if (item["loc"], item["type"]) not in seen]
        unsure |= {plain_place(section, item["loc"]) for item in items}
    return readable(section, known, unsure), problems


def readable(section: type[SectionT], values: Any, unsure: set[Place]) -> SectionT:
    """A section of the values that can be read; those at `unsure` places are `UNREAD`."""
    if () in unsure or not isinstance(values, dict):
        nothing: SectionT = UNREAD
        return nothing
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        own = {place[1:] for place in unsure if place[0] == name}
        value = values.get(name)
        inner = section_of(section, name, value)
        if own and inner is not None and isinstance(value, dict) and () not in own:
            fields[name] = readable(inner, value, own)
        elif own:
            fields[name] = UNREAD
        elif name in values:
            fields[name] = _checked(section, field, value)
    return section.model_construct(_fields_set=set(fields), **fields)


def section_of(section: type[BaseModel], name: str, value: Any = None) -> type[BaseModel] | None:
    """The section that a field holds, or None where it holds a value.

    Args:
        section, name: the field. value: what it holds, which tells the section of a field that may hold several.
    """
    field = section.model_fields[name]
    options = sections_in(section, name) if get_origin(field.annotation) in (None, Union, UnionType) else []
    if field.discriminator is None:
        return options[0] if options else None
    key = str(field.discriminator)
    tag = value.get(key) if isinstance(value, Mapping) else None
    return next((one for one in options if has_tag(one, key, tag)), None)


def _unsure(section: type[BaseModel], error: ValidationError, values: Any) -> Iterator[Place]:
    for item in error.errors(include_url=False):
        place: Place = plain_place(section, item["loc"])
        if item["type"] != "extra_forbidden":
            yield place
            continue
        beside = reduce(lambda inner, part: inner[part], place[:-1], values)
        meant = closest(str(place[-1]), fields_at(section, item["loc"][:-1]))
        if meant and meant not in beside:
            yield (*place[:-1], meant)


def _without_unknown(section: type[BaseModel], error: ValidationError, values: Any) -> Any:
    """The values without keys that the section does not have."""
    known = copy.deepcopy(values)
    for item in error.errors(include_url=False):
        if item["type"] == "extra_forbidden":
            *parents, name = plain_place(section, item["loc"])
            del reduce(lambda inner, part: inner[part], parents, known)[name]
    return known


def _checked(section: type[BaseModel], field: FieldInfo, value: Any) -> Any:
    """A value that its field has accepted, as the field holds it."""
    kind: Any = field.annotation
    for bound in field.metadata:
        kind = Annotated[kind, bound]
    if field.discriminator is not None:
        kind = Annotated[kind, Field(discriminator=field.discriminator)]
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=section.model_config.get("strict"))
