"""Parts of a model trained on every axis give the losses, gradients, norms and weights of a plain loop over torch's
AdamW in which the other parameters are frozen by hand; what is frozen keeps every bit.

The limits are those of test_parity.py.
"""

import pytest
from parity import EVEN, MIXED, Row, over_limits
from parts_parity import CHOICES, PartsRow, run_rows
from ranks import run_ranks
from test_parity import OVERLAPPED, SHARDED, layout, pp, ring, sp, speeds, ulysses, zero

from mm.config.place import process_place
from mm.config.recompute import Recompute
from mm.device.backend import select
from mm.doctor.parity import RelativeErrors
from mm.supervise.job import Job

FULL = Recompute()
OFFLOAD = Recompute(full_layers=0, keep_layers=None, kept="q,k,v,O", offload=True)
BLOCKS, NORMS, HEAD, EMBEDDERS, FIRST, MOTION, VACE, TEXT = CHOICES

ROWS = [
    PartsRow(Row(layout(1)), BLOCKS),
    PartsRow(Row(layout(1)), NORMS),
    PartsRow(Row(layout(1), recompute=FULL), HEAD),
    PartsRow(Row(layout(1)), EMBEDDERS),
    PartsRow(Row(layout(1), recompute=OFFLOAD), FIRST),
    PartsRow(Row(layout(1), model_type="speedcontrol"), MOTION),
    PartsRow(Row(layout(1), model_type="speedcontrol"), MOTION, ("q", "ffn.0")),
    PartsRow(Row(layout(1), model_type="vace"), VACE),
    PartsRow(zero(1, 1), BLOCKS),
    # two processes: every axis alone
    PartsRow(Row(layout(2), SHARDED), BLOCKS),
    PartsRow(Row(layout(2), OVERLAPPED, samples=EVEN), FIRST),
    PartsRow(Row(layout(2), SHARDED), HEAD),
    PartsRow(Row(layout(2, **sp(2))), BLOCKS),
    PartsRow(Row(layout(2, **sp(2)), recompute=FULL), NORMS),
    PartsRow(Row(layout(2, **sp(2))), EMBEDDERS),
    PartsRow(Row(layout(2, tp_size=2)), BLOCKS),
    PartsRow(Row(layout(2, tp_size=2)), NORMS),
    PartsRow(Row(layout(2, tp_size=2)), EMBEDDERS),
    PartsRow(Row(layout(2, **pp(2))), BLOCKS),
    PartsRow(Row(layout(2, **pp(2)), recompute=OFFLOAD), HEAD),
    PartsRow(Row(layout(2, **pp(2))), EMBEDDERS),
    PartsRow(Row(layout(2, **pp(2)), SHARDED, recompute=FULL), FIRST),
    PartsRow(Row(layout(2, **pp(2, 2)), OVERLAPPED), HEAD),
    PartsRow(Row(layout(2, **pp(2, 2))), FIRST),
    PartsRow(Row(layout(2, **ulysses(2))), BLOCKS),
    PartsRow(Row(layout(2, **ulysses(2))), NORMS),
    PartsRow(Row(layout(2, **ring(2)), recompute=FULL), TEXT),
    PartsRow(zero(2, 2), BLOCKS),
    PartsRow(zero(2, 2), NORMS),
    PartsRow(zero(2, 2), EMBEDDERS),
    PartsRow(zero(2, 2), HEAD),
    PartsRow(zero(2, 1, SHARDED), FIRST),
    PartsRow(speeds(2, **pp(2)), MOTION),
    PartsRow(speeds(2, **pp(2)), MOTION, ("q", "ffn.0")),
    PartsRow(speeds(2, **sp(2)), MOTION, ("q", "ffn.0")),
    PartsRow(Row(layout(2, **pp(2)), model_type="vace"), VACE),
    PartsRow(Row(layout(2, **sp(2)), model_type="vace"), VACE),
    PartsRow(zero(2, 2), TEXT, ("q", "ffn.0")),
    # four: pairs
    PartsRow(Row(layout(4, **sp(2), **pp(2)), SHARDED, recompute=FULL), BLOCKS),
    PartsRow(Row(layout(4, **pp(2, 2), **ulysses(2)), SHARDED, samples=MIXED), NORMS),
    PartsRow(Row(layout(4, **pp(4)), OVERLAPPED), TEXT),
    PartsRow(zero(4, 2, SHARDED, MIXED), BLOCKS),
    PartsRow(zero(4, 2, **sp(2)), NORMS, ("q",)),
    PartsRow(zero(4, 2, **pp(2, 2)), EMBEDDERS),
]  # fmt: skip

EVERY_DAY = [
    next(row for row in ROWS if row.row.layout.world_size == 1),
    PartsRow(Row(layout(2), SHARDED), BLOCKS),
    PartsRow(zero(2, 2), BLOCKS),
    PartsRow(speeds(2, **pp(2)), MOTION, ("q", "ffn.0")),
]
"""The others are nightly."""


def rows_of(world_size: int, every_day: bool) -> list[PartsRow]:
    return [row for row in ROWS if row.row.layout.world_size == world_size and (row in EVERY_DAY) == every_day]


def work(world_size: int, every_day: bool) -> dict[str, RelativeErrors]:
    backend = select("cpu")
    with Job(process_place(), backend.collective, backend.device, 2):
        return run_rows(rows_of(world_size, every_day), backend)


@pytest.fixture(scope="module")
def results() -> dict[tuple[int, bool], dict[str, RelativeErrors]]:
    return {}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            id=f"{row.row.layout.world_size}-{row.id}",
            marks=[] if row in EVERY_DAY else [pytest.mark.nightly],
        )
        for row in ROWS
    ],
)
def test_equals_a_plain_loop_with_the_rest_frozen(
    row: PartsRow, results: dict[tuple[int, bool], dict[str, RelativeErrors]]
) -> None:
    world, every_day = row.row.layout.world_size, row in EVERY_DAY
    if (world, every_day) not in results:
        results[world, every_day] = run_ranks(world, work, world, every_day, timeout_s=400)[0]
    assert over_limits(row.row, results[world, every_day][row.id]) == {}
