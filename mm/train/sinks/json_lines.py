"""Files of one JSON object a line in the run's folder: metrics.jsonl, evaluation.jsonl, and what others name."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from pathlib import Path

from mm.train.records import EVALUATION_FILE, METRICS_FILE, Record
from mm.train.sinks.base import Sink

logger = logging.getLogger(__name__)


class JsonLines(Sink):
    """Appends each record to its file. A disk that refuses a line is told, and does not end the run."""

    def __init__(self, folder: Path) -> None:
        """Write into a run's folder, whose files `mm.train.records.drop_repeated_steps` has looked through."""
        self._folder, self._first_step = folder, 1
        self._looked_through = {METRICS_FILE, EVALUATION_FILE}
        self._lost = 0

    def begin(self, first_step: int, total_steps: int) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._first_step = first_step

    def write(self, record: Record) -> None:
        """Append a line to the record's file, if it has one."""
        if record.file is not None:
            self._append(record.file, record.as_json())

    def _look_through(self, name: str) -> None:
        """Leave the lines of earlier steps; a line without a step, as one cut off by a kill, is of none of them."""
        path = self._folder / name
        if name in self._looked_through or not path.exists():
            return
        lines = path.read_text().splitlines(keepends=True)
        kept = "".join(line for line in lines if line.endswith("\n") and _step_of(line) < self._first_step)
        if kept != "".join(lines):
            temporary = path.with_suffix(".tmp")
            temporary.write_text(kept)
            os.replace(temporary, path)

    def _append(self, name: str, line: str) -> None:
        """A line at the end of a file, whole or not at all."""
        path, size = self._folder / name, None
        try:
            self._look_through(name)
            self._looked_through.add(name)
            size = path.stat().st_size if path.exists() else 0
            with path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            with suppress(OSError):  # half a line in the middle of the file would make it unreadable
                if size is not None:
                    os.truncate(path, size)
            if self._lost == 0:
                logger.error("%s cannot be written (%s); training goes on, lines are lost", path, error)
            self._lost += 1
            return
        if self._lost > 0:
            logger.warning("%s is written again; %d lines are lost", path, self._lost)
        self._lost = 0


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")
