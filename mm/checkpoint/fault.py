"""Named places where a test may kill the process, so that every step of the commit protocols has a kill test.

`point(name)` does nothing unless the environment variable MM_FAULT is `name:nth:action`: then the nth time that this
process passes the point it dies as by `kill -9` (`kill9`), raises (`raise`), or finds the disk full (`enospc`).
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

from mm.errors import ConfigError

# In the order of the protocol. A test runs over these lists, so a new step without a kill test cannot be added.
SAVE_POINTS = (
    "save.start",
    "save.folder_created",
    "save.shard_half_written",
    "save.shard_written",
    "save.shard_durable",
    "save.gathered",
    "save.derived_written",
    "save.manifest_written",
    "save.before_rename",
    "save.committed",
    "save.tracker_drafted",
    "save.tracker_written",
    "save.marked",
    "save.trashed",
    "save.done",
)
REPLACE_POINTS = ("save.old_moved_away",)  # passed only when the step was saved before
CONVERT_POINTS = ("convert.folder_created", "convert.files_written", "convert.before_rename", "convert.committed")
ADD_POINTS = ("convert.entry_moved",)  # passed once for each entry that is added to a folder with other things in it

_passed: Counter[str] = Counter()  # the one count that must outlive a call: "the nth time in this process"


class FaultInjected(RuntimeError):  # noqa: N818  (it is what a test asked for)
    """Raised by the action `raise`: a failure that no code expects."""


def point(name: str) -> None:
    """Pass the place `name`; see the module's docstring.

    Raises:
        ConfigError: CFG-079 when MM_FAULT names no known place or action.
    """
    setting = os.environ.get("MM_FAULT")
    if not setting:
        return
    place, nth, action = _parse(setting)
    if place != name:
        return
    _passed[name] += 1
    if _passed[name] != nth:
        return
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    raise FaultInjected(name)


def _parse(setting: str) -> tuple[str, int, str]:
    place, _, rest = setting.partition(":")
    nth, _, action = rest.partition(":")
    known = (*SAVE_POINTS, *REPLACE_POINTS, *CONVERT_POINTS, *ADD_POINTS)
    if place not in known or not nth.isdigit() or action not in ("kill9", "raise", "enospc"):
        raise ConfigError(
            "CFG-079",
            f'The environment variable MM_FAULT is "{setting}", not place:nth:action with a known place.',
            "Unset it (it exists for tests), or see mm/checkpoint/fault.py for the places.",
        )
    return place, int(nth), action
