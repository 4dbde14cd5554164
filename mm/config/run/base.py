"""A run of any kind: what its sections have in common, and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mm.config.base import Section
from mm.config.run.origins import Origins
from mm.config.unread import built, section_of
from mm.errors import Problem

RunT = TypeVar("RunT", bound="Run")


class Run(Section):
    """A run of one kind.

    Attributes:
        sections: the type of what its file holds.
        origins: the user's word for each value. world_size: the processes that were started.
        problems: what the user's words say that sections cannot hold, such as one value said twice and differently;
            a run that has any is only looked at by the rules.
        notes: what the user's files say that is how it is done here anyway, as lines for the log.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    sections: ClassVar[type[Section]]

    origins: Origins = Field(Origins(), exclude=True, repr=False)
    world_size: int = Field(1, ge=1, exclude=True)
    problems: tuple[Problem, ...] = Field((), exclude=True, repr=False)
    notes: tuple[str, ...] = Field((), exclude=True, repr=False)

    def word(self, path: str) -> str:
        """Word that the user wrote a value with, or would: `--lr`, `predictor.num_heads in m.json`."""
        return self.origins[path].full()

    def values(self) -> dict[str, Any]:
        """Every value by its path; that of a section that may be left out is True or None."""
        return dict(_leaves(self.sections, written(self)))

    def on(self: RunT, world_size: int) -> RunT:
        """The run on so many processes."""
        return self.model_copy(update={"world_size": world_size})

    def changed(self: RunT, values: Mapping[str, Any], world_size: int | None = None) -> RunT:
        """The run with other values, by path; a section that was not there begins with its defaults.

        Raises:
            pydantic.ValidationError: for values that the sections do not take.
        """
        sections = written(self)
        for path, value in values.items():
            *parents, name = path.split(".")
            place = sections
            for parent in parents:
                if place[parent] is None:
                    place[parent] = {}
                place = place[parent]
            place[name] = value
        return self.described(
            self.sections.model_validate_json(json.dumps(sections)), self.origins, world_size or self.world_size
        )

    @classmethod
    def described(
        cls: type[RunT],
        sections: Section,
        origins: Origins,
        world_size: int = 1,
        problems: tuple[Problem, ...] = (),
        notes: tuple[str, ...] = (),
    ) -> RunT:
        """The run that checked sections describe, on so many processes."""
        values = {name: getattr(sections, name) for name in cls.sections.model_fields}
        about = {"origins": origins, "world_size": world_size, "problems": problems, "notes": notes}
        return built(cls, values | about)


def written(section: BaseModel) -> dict[str, Any]:
    """The values of sections as a file holds them: plain, all defaults filled in, nothing that has no effect."""
    values: dict[str, Any] = section.model_dump(mode="json")
    objective = values.get("objective")
    if objective is not None and objective["timestep_sampling"] != "logit_normal":
        del objective["logit_mean"], objective["logit_std"]  # refused where they have no effect
    return values


def _leaves(section: type[BaseModel], values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        inner = section_of(section, name, value)
        if inner is not None and value is not None:
            if not isinstance(section.model_fields[name].annotation, type):
                yield f"{path}{name}", True
            yield from _leaves(inner, value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
