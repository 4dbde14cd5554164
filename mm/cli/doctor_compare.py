"""`mm doctor compare A B`: the first step in which two runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.errors import ConfigError, DifferenceError


def main(argv: Sequence[str]) -> None:
    """Compare two runs' metrics.jsonl, or the folders that hold them, and say where they part.

    Raises:
        ConfigError: CFG-006 unless two paths are given.
        DifferenceError: NUM-004 (exit code 17) where they differ, or have no step in common.
    """
    if len(argv) != 2 or any(word.startswith("-") for word in argv):
        usage = "mm doctor compare takes two runs: folders or metrics.jsonl files"
        raise ConfigError("CFG-006", f"{usage}; it was given {' '.join(argv) or 'nothing'}.", "Give exactly two.")
    from mm.doctor.compare import first_difference

    first, second = map(Path, argv)
    equal, difference = first_difference(first, second)
    if difference is not None:
        raise DifferenceError(
            "NUM-004",
            f"{first} and {second} are equal for {equal} steps and differ at step {difference.step} in "
            f"{difference.field}: {_shown(difference.first)} and {_shown(difference.second)}.",
            f"Look there: {difference.meaning}.",
        )
    if equal == 0:
        raise DifferenceError("NUM-004", f"{first} and {second} have no step in common.", "Compare runs that overlap.")
    print(f"equal, bit for bit, in all {equal} steps that both have")


def _shown(value: object) -> str:
    text = str(value)
    if text.startswith(("0x", "-0x")):
        return f"{text} ({float.fromhex(text):.9g})"
    return text if len(text) <= 120 else text[:117] + "..."
