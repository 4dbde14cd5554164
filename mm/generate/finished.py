"""Clips that an earlier start of the same command has finished: their descriptions say what made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.errors import DataError
from mm.generate.rows import GenerationRow
from mm.generate.video import clip_path

Description = Mapping[str, Any]


def finished_clips(
    folder: Path, rows: Sequence[GenerationRow], describe: Callable[[GenerationRow], Description]
) -> dict[int, str]:
    """The rows whose clips are there, each with the fingerprint of the transformer that made it.

    Args:
        folder: of the clips. rows: of this command.
        describe: what this command would write beside a row's clip; the transformer's fingerprint may be missing.

    Raises:
        DataError: DATA-050 when a clip, or a description without one, is of another command.
    """
    found: dict[int, str] = {}
    others: list[str] = []
    for row in rows:
        path = clip_path(folder, row.index)
        if not path.exists() and not path.with_suffix(".json").exists():
            continue
        said = _read(path.with_suffix(".json"))
        differing = sorted(_differing(said, json.loads(json.dumps(describe(row)))))
        if differing:
            others.append(f"{path.name} ({', '.join(differing[:5])})")
        elif path.exists():
            found[row.index] = said["transformer"]["fingerprint"]
    if others:
        raise _of_another_command(folder, others, "that is not what this command makes")
    return found


def require_same_weights(folder: Path, found: Mapping[int, str], fingerprints: Iterable[str]) -> None:
    """Refuse clips that other weights have made.

    Args:
        folder, found: as for and from `finished_clips`.
        fingerprints: of the transformer, of every rank that has read all of it.

    Raises:
        DataError: DATA-050.
    """
    for fingerprint in fingerprints:
        others = [clip_path(folder, index).name for index, said in found.items() if said != fingerprint]
        if others:
            raise _of_another_command(folder, others, "of other weights than these")


def _of_another_command(folder: Path, others: Sequence[str], what: str) -> DataError:
    message = f"{folder} holds {len(others)} clips {what}, the first is {others[0]}."
    return DataError("DATA-050", message, "Choose another --save-path, or give --overwrite.")


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _differing(said: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    """Keys that differ, except for the transformer's fingerprint."""
    if not isinstance(said.get("transformer"), dict) or "fingerprint" not in said["transformer"]:
        return {"no description of it"}
    one, other = ({**about, "transformer": {**about["transformer"], "fingerprint": ""}} for about in (said, expected))
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
