"""All tasks, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from mm.config.tasks.flf2v import FLF2V
from mm.config.tasks.i2v import I2V
from mm.config.tasks.speedcontrol import SPEEDCONTROL
from mm.config.tasks.t2v import T2V
from mm.config.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (T2V, I2V, FLF2V, SPEEDCONTROL)}
DEFAULT = T2V
"""Where nothing says a task."""

ALL_COLUMNS = frozenset(column.name for task in TASKS.values() for column in task.columns)
ALL_RECIPE_FIELDS = frozenset[str]().union(*(task.recipe for task in TASKS.values()))


def named(tasks: Iterable[Task], between: str = " or ") -> str:
    """`a, b or c`."""
    *first, last = (task.name for task in tasks)
    return f"{', '.join(first)}{between}{last}" if first else last


def _known(name: str) -> str:
    if name not in TASKS:
        *first, last = (f"'{known}'" for known in TASKS)
        raise ValueError(f"Input should be {', '.join(first)} or {last}")
    return name


TaskName = Annotated[str, AfterValidator(_known)]
"""A key of `TASKS`, in configurations."""
