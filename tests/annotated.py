"""Annotations as tests read them: the samples of data sets, or the problems of all rows in one error."""

from collections.abc import Sequence

from mm.config.data import DataSource
from mm.config.tasks.task import Task
from mm.data.files import raise_limited
from mm.data.metadata import VideoSample
from mm.data.sources.checking import CheckedRow, iterate_rows


def check_rows(sources: Sequence[DataSource], task: Task | None = None) -> list[CheckedRow]:
    """All rows; those that are no rows of any kind in one error."""
    rows = list(iterate_rows(sources, task))
    raise_limited([problem for row in rows for problem in row.problems if problem.id == "DATA-060"])
    return rows


def load_samples(sources: Sequence[DataSource]) -> list[VideoSample]:
    rows = check_rows(sources)
    raise_limited([problem for row in rows for problem in row.problems])
    return [row.sample for row in rows if row.sample is not None]
