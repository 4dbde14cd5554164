"""Base of every configuration section: closed, typed, immutable, and checked all at once.

A file is read with `load_json`, checked with `parse`; both collect `Problem`s so that a user sees everything that is
wrong in one run. Unknown keys are errors with the closest known key as a hint.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from mm.errors import ConfigError, Problem, raise_all


class Section(BaseModel):
    """Base of all configuration sections: unknown keys refused, fields immutable, no coercion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


def load_json(path: Path) -> Any:
    """Read a JSON file strictly.

    Raises:
        ConfigError: CFG-001 when the file is missing or unreadable, CFG-002 when it is not JSON, has a key twice, or
            holds NaN or Infinity.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "CFG-001", f"{path} cannot be read ({error}).", "Check the path and its permissions."
        ) from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> Any:
    """JSON, strictly; `source` is what to call it. Raises CFG-002 as `load_json`."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        message = f"{source} is not strict JSON: {error}."
        raise ConfigError("CFG-002", message, "Correct the file at that place.") from None


def parse(section: type[SectionT], values: Any, source: str) -> SectionT:
    """Check `values` (parsed JSON) against `section`.

    Args:
        section: the section's type.
        values: what the file holds at this place.
        source: what to call it in messages, usually the file's path.

    Raises:
        ConfigError: CFG-003 for an unknown key, CFG-004 for a missing key, CFG-005 for a wrong type or value; all of
            them at once.
    """
    try:
        return section.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise_all(ConfigError, validation_problems(section, error, source))
        raise AssertionError("a validation error without problems") from None


def load(section: type[SectionT], path: Path) -> SectionT:
    """`load_json` followed by `parse`; raises what they raise."""
    return parse(section, load_json(path), str(path))


def validation_problems(section: type[BaseModel], error: ValidationError, source: str) -> list[Problem]:
    """Translate pydantic's report into our problems, in its order."""
    return [_problem(section, item, source) for item in error.errors(include_url=False)]


def take_retired(values: Any, retired: Mapping[str, str], source: str) -> Iterator[Problem]:
    """Report (CFG-008) and remove keys of other systems that mean nothing here, so that they are not unknown as well.

    Args:
        values: parsed JSON; changed in place.
        retired: dotted keys, each with what to do instead.
        source: what to call the file.
    """
    for dotted, remedy in retired.items():
        *parents, name = dotted.split(".")
        place = values
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and name in place:
            del place[name]
            yield Problem("CFG-008", f'{source}: "{dotted}" has no effect here.', remedy)


def closest(word: str, known: list[str]) -> str:
    """The known word that is a slip of the pen away, or an empty text where there is none."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.8)), "")


def hint(word: str, known: list[str]) -> str:
    """A hint such as ` Did you mean "num_frames"?`, or an empty text when nothing known is a slip of the pen away."""
    meant = closest(word, known)
    return f' Did you mean "{meant}"?' if meant else ""


def _problem(section: type[BaseModel], item: Mapping[str, Any], source: str) -> Problem:
    location = ".".join(str(part) for part in plain_place(section, item["loc"]))
    if item["type"] == "union_tag_not_found":
        return Problem("CFG-004", f'{source} lacks the key "{location}.{_tag_key(item)}".', "Add it.")
    if item["type"] == "union_tag_invalid":
        found = f'{source}: "{location}.{_tag_key(item)}" is {_short(item["ctx"]["tag"])}'
        return Problem(
            "CFG-005", f"{found}; expected is one of {item['ctx']['expected_tags']}.", "Give it one of these."
        )
    if item["type"] == "extra_forbidden":
        meant = hint(str(item["loc"][-1]), fields_at(section, tuple(item["loc"])[:-1]))
        return Problem("CFG-003", f'{source} has the unknown key "{location}".{meant}', "Correct or remove the key.")
    if item["type"] == "missing":
        return Problem("CFG-004", f'{source} lacks the key "{location}".', "Add it.")
    where = f'{source}: "{location}" is {_short(item["input"])}' if location else source
    message = str(item["msg"]).removeprefix("Value error, ")
    return Problem("CFG-005", f"{where}; {message[:1].lower()}{message[1:]}.", "Give it a value of that kind.")


def fields_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names known at a place inside nested sections, as pydantic tells it."""
    return list(_walk(section, location)[1].model_fields)


def plain_place(section: type[BaseModel], location: tuple[Any, ...]) -> tuple[Any, ...]:
    """A place as pydantic tells it, without the words by which it tells sections of one field from each other."""
    return _walk(section, location)[0]


def sections_in(section: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The sections that a field may hold; where they are several, a key of theirs (`tag_of`) tells which."""
    annotation = section.model_fields[name].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return [one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)]


def has_tag(section: type[BaseModel], key: str, tag: object) -> bool:
    """Tell whether a section of several is the one that a word in its key names."""
    return key in section.model_fields and tag in get_args(section.model_fields[key].annotation)


def _walk(section: type[BaseModel], location: tuple[Any, ...]) -> tuple[tuple[Any, ...], type[BaseModel]]:
    """The place inside nested sections, and the section there."""
    place: list[Any] = []
    current, options, key = section, list[type[BaseModel]](), ""
    for part in location:
        if len(options) > 1 and (chosen := next((one for one in options if has_tag(one, key, part)), None)):
            current, options = chosen, []
            continue
        place.append(part)
        if isinstance(part, str) and part in current.model_fields:
            options, key = sections_in(current, part), str(current.model_fields[part].discriminator or "")
            current = options[0] if options else current
    return tuple(place), current


def _tag_key(item: Mapping[str, Any]) -> str:
    return str(item["ctx"]["discriminator"]).strip("'")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f'the key "{name}" occurs twice')
        result[name] = value
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
