"""A camera's path as a line says it: a pose file, or a direction with a speed, `Left 0.02`.

It imports no torch, since lines are looked at before anything is loaded.
"""

from __future__ import annotations

import re

_MOVE = re.compile(r"((?:Left|Right|Up|Down|In|Out)+)(?:\s+(\S+))?")


def is_move(line: str) -> bool:
    """Tell whether a line is a direction and not a path; a file of such a name is `./Left`."""
    return _MOVE.fullmatch(line) is not None


def read_move(line: str) -> tuple[str, str | None]:
    """Direction and speed of a line that `is_move`, as they stand there."""
    found = _MOVE.fullmatch(line)
    assert found is not None  # noqa: S101  whoever calls has asked
    return found[1], found[2]
