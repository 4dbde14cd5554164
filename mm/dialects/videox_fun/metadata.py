"""The rows of a metadata file, counted: VideoX-Fun says the length of a training in passes over them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.config.base import load_json, parse_json
from mm.errors import ConfigError

_VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".gif")


@dataclass(frozen=True)
class Rows:
    """Numbers of rows of a metadata file, by what they are."""

    videos: int
    images: int

    @property
    def all(self) -> int:
        """Both."""
        return self.videos + self.images


def count_rows(path: str) -> Rows:
    """Count the rows of a `.json`, `.jsonl` or `.csv` file; what is wrong in a row, reading it tells.

    Raises:
        ConfigError: CFG-346 for a file of another kind, one that cannot be read, or one without rows.
    """
    try:
        rows = [row for row in _rows(Path(path)) if isinstance(row, Mapping)]
    except (OSError, UnicodeDecodeError, csv.Error, ConfigError) as error:
        found = f"--train_data_meta {path} cannot be read ({error})."
        raise ConfigError("CFG-346", found, "Name a metadata.json, .jsonl or .csv; see docs/data.md.") from None
    if not rows:
        found = f"--train_data_meta {path} has no rows."
        raise ConfigError("CFG-346", found, 'It is a list of objects with "file_path" and "text".')
    videos = sum(map(_is_video, rows))
    return Rows(videos, len(rows) - videos)


def _rows(path: Path) -> Iterable[Any]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [parse_json(line, f"line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    values = load_json(path)
    return values if isinstance(values, list) else []


def _is_video(row: Mapping[str, Any]) -> bool:
    said = row.get("type")
    return said == "video" if said else str(row.get("file_path", "")).lower().endswith(_VIDEOS)
