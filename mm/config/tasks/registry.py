"""All tasks, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

from pydantic import AfterValidator

from mm.config.tasks.flf2v import FLF2V
from mm.config.tasks.fun_camera import FUN_CAMERA
from mm.config.tasks.fun_control import FUN_CONTROL
from mm.config.tasks.fun_control_ref import FUN_CONTROL_REF
from mm.config.tasks.fun_inp import FUN_INP
from mm.config.tasks.i2v import I2V
from mm.config.tasks.speedcontrol import SPEEDCONTROL
from mm.config.tasks.t2v import T2V
from mm.config.tasks.task import Source, Task
from mm.config.tasks.ti2v import TI2V
from mm.config.tasks.vace import VACE
from mm.config.tasks.wan22_i2v import WAN22_I2V

_ALL = (T2V, I2V, FLF2V, SPEEDCONTROL, FUN_CONTROL, FUN_CONTROL_REF, FUN_CAMERA, VACE, WAN22_I2V, TI2V)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
"""Tasks that models are of."""
FEATURE_TASKS: dict[str, Task] = {**TASKS, FUN_INP.name: FUN_INP}
"""Tasks that features are of."""
DEFAULT = T2V
"""Where nothing says a task."""

ALL_COLUMNS = frozenset(column.name for task in FEATURE_TASKS.values() for column in task.columns)
ALL_MEDIA = frozenset(media.name for task in FEATURE_TASKS.values() for media in task.media)
SETTINGS = tuple(sorted({feature.name for task in _ALL for feature in task.made_by(Source.SETTING)}))
"""Features that are numbers which generation sets."""
ALL_RECIPE_FIELDS = frozenset[str]().union(*(task.recipe for task in TASKS.values()))


def named(tasks: Iterable[Task], between: str = " or ") -> str:
    """`a, b or c`."""
    *first, last = (task.name for task in tasks)
    return f"{', '.join(first)}{between}{last}" if first else last


def _among(tasks: Iterable[str]) -> Callable[[str], str]:
    """Check of a name."""
    known = list(tasks)

    def check(name: str) -> str:
        if name not in known:
            *first, last = (f"'{one}'" for one in known)
            raise ValueError(f"Input should be {', '.join(first)} or {last}")
        return name

    return check


TaskName = Annotated[str, AfterValidator(_among(TASKS))]
"""A key of `TASKS`, in configurations."""
FeatureTaskName = Annotated[str, AfterValidator(_among(FEATURE_TASKS))]
"""A key of `FEATURE_TASKS`, in configurations."""
