"""What a step of a smoke run is given and has to say (`benchmarks/smoke.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OK, FAILED, TIMED_OUT, NOT_RUN = "ok", "failed", "timed out", "not run: no time left"
SKIPPED = "skipped: "
"""What the result of a step begins with that has nothing to do here; the reason follows."""


@dataclass(frozen=True)
class Place:
    """Where a step runs.

    Attributes:
        folder: of the run, shared by its steps, for what they make.
        kind: of device; None asks for the best there is.
        limit_s: seconds that the step has.
    """

    folder: Path
    kind: str | None
    limit_s: float


@dataclass(frozen=True)
class Found:
    """What a step has to say.

    Attributes:
        result: `OK`, `FAILED`, or `SKIPPED` and why.
        text: one line. figures: the same as values.
    """

    result: str
    text: str
    figures: dict[str, Any]


def found(text: str, **figures: Any) -> Found:
    """All is well."""
    return Found(OK, text, figures)


def skipped(why: str) -> Found:
    """There is nothing to do here."""
    return Found(SKIPPED + why, "", {})


def require(truth: bool, text: str) -> None:
    """End a step that has found something wrong."""
    if not truth:
        raise AssertionError(text)


@dataclass(frozen=True)
class Step:
    """One row of the table.

    Attributes:
        name: what it is called. run: does it, in a process of its own. limit_s: seconds after which it is ended.
    """

    name: str
    run: Callable[[Place], Found]
    limit_s: float
