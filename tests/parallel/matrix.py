"""Rows of the parity matrix as the cases of a test; all of one number of processes share one start."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from parity import Row, over_limits, run_rows
from ranks import run_ranks

from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor.parity import RelativeErrors
from mm.supervise.job import Job


class Matrix:
    """Rows with what is found of them, as their processes run when the first of them is asked for.

    Args:
        rows: all. every_day: those of them that are not nightly.
    """

    def __init__(self, rows: Sequence[Row], every_day: Sequence[Row]) -> None:
        self.rows, self.every_day = rows, every_day
        self._found: dict[tuple[int, bool], dict[str, RelativeErrors]] = {}

    def cases(self) -> list[Any]:
        """A parameter for each row."""
        return [
            pytest.param(
                row,
                id=f"{row.layout.world_size}-{row.id}",
                marks=[] if row in self.every_day else [pytest.mark.nightly],
            )
            for row in self.rows
        ]

    def check(self, row: Row) -> None:
        """Compare a row with one process."""
        world, every_day = row.layout.world_size, row in self.every_day
        if (world, every_day) not in self._found:
            together = [
                one for one in self.rows if one.layout.world_size == world and (one in self.every_day) == every_day
            ]
            self._found[world, every_day] = run_ranks(world, _work, together, timeout_s=400)[0]
        errors = self._found[world, every_day][row.id]
        _record(row, errors)
        assert over_limits(row, errors) == {}


def _work(rows: list[Row]) -> dict[str, RelativeErrors]:
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 2):
        return run_rows(rows, backend)


def _record(row: Row, errors: RelativeErrors) -> None:
    """Append the row to the file that MM_PARITY_TABLE names; docs/parallelism.md shows it."""
    path = os.environ.get("MM_PARITY_TABLE")
    if path:
        with Path(path).open("a") as table:
            table.write(json.dumps({"processes": row.layout.world_size, "layout": row.id, **vars(errors)}) + "\n")
