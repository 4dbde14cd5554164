"""Annotations as tests read them: the samples of data sets, or the problems of all rows in one error."""

from collections.abc import Sequence

from mm.config.data import DataSource
from mm.data.files import raise_limited
from mm.data.metadata import VideoSample
from mm.data.sources.checking import check_rows


def load_samples(sources: Sequence[DataSource]) -> list[VideoSample]:
    rows = check_rows(sources)
    raise_limited([problem for row in rows for problem in row.problems])
    return [row.sample for row in rows if row.sample is not None]
