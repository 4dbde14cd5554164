"""Models of the Wan family on every axis give the losses, gradients, norms and weights of one process.

The comparison and its limits are those of the parity matrix (`test_parity`).
"""

import pytest
from family_rows import EVERY_DAY, ROWS
from parity import Row, over_limits, run_rows
from ranks import run_ranks
from test_parity import record

from mm.config.place import process_place
from mm.device.backend import select
from mm.doctor.parity import RelativeErrors
from mm.supervise.job import Job

Results = dict[str, RelativeErrors]


def rows_of(world_size: int, every_day: bool) -> list[Row]:
    return [row for row in ROWS if row.layout.world_size == world_size and (row in EVERY_DAY) == every_day]


def work(world_size: int, every_day: bool) -> Results:
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 2):
        return run_rows(rows_of(world_size, every_day), backend)


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, bool], Results]:
    return {}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.layout.world_size}-{row.id}",
            marks=[] if row in EVERY_DAY else [pytest.mark.nightly],
        )
        for row in ROWS
    ],
)
def test_equals_one_process(row: Row, results: dict[tuple[int, bool], Results]) -> None:
    world, every_day = row.layout.world_size, row in EVERY_DAY
    if (world, every_day) not in results:
        results[world, every_day] = run_ranks(world, work, world, every_day, timeout_s=400)[0]
    errors = results[world, every_day][row.id]
    record(row, errors)
    assert over_limits(row, errors) == {}
