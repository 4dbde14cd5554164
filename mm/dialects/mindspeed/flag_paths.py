"""The path of the section's value that a flag stands for, said at the flag's own field.

    train_iters: int = sets("training.steps", ge=1, description="...")

Reading a command line, naming a value in a message and writing what would change it all go through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from pydantic import Field

from mm.config.flags import Flags, flag_name
from mm.config.run.origins import Word
from mm.config.unread import Unread

_KEY = "sets"


@dataclass(frozen=True)
class _Sets:
    path: str
    values: Mapping[Any, Any]
    absent: Any


def sets(
    path: str, default: Any = ..., *, values: Mapping[Any, Any] | None = None, absent: Any = None, **constraints: Any
) -> Any:
    """Field of a flag that stands for a value of a section.

    Args:
        path: of the value, `optimizer.lr`. default, constraints: as for pydantic's `Field`.
        values: the flag's value for a value of the section, where they differ.
        absent: the section's value where the flag is not given.
    """
    return Field(default, json_schema_extra={_KEY: _Sets(path, values or {}, absent)}, **constraints)  # type: ignore[dict-item]


NOT = {True: False, False: True}
"""Values of a switch that turns something off."""


@dataclass(frozen=True)
class Flag:
    """A flag that stands for a value.

    Attributes:
        field: its field. values, absent: see `sets`.
    """

    field: str
    values: Mapping[Any, Any] = dataclass_field(default_factory=dict)
    absent: Any = None

    def read(self, flags: Flags) -> Any:
        """The section's value."""
        given = getattr(flags, self.field)
        if given is None or isinstance(given, Unread):
            return self.absent if given is None else given
        return next((value for value, spelled in self.values.items() if spelled == given), given)

    def spelled(self, value: Any) -> Any:
        """The flag's value."""
        return self.values.get(value, value) if self.values else value

    def word(self) -> Word:
        """Word for messages: the flag's name."""
        return Word(flag_name(self.field), spelled=self.spelled)


def flags_by_path(flags: type[Flags]) -> dict[str, Flag]:
    """The flags of a command that each stand for one value, by its path, in the order of the command's help."""
    found: dict[str, Flag] = {}
    for name, info in flags.model_fields.items():
        said = info.json_schema_extra.get(_KEY) if isinstance(info.json_schema_extra, dict) else None
        if isinstance(said, _Sets):
            found[said.path] = Flag(name, said.values, said.absent)
    return found
