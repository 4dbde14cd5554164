"""Bytes and calls, counted at the collectives of real processes, equal the closed formulas."""

from functools import cache
from typing import Any

import pytest
from ranks import run_ranks
from traffic_rows import EIGHT, FOUR, MORE_FOUR, Row, a_layer, count

from mm.doctor import formulas

SETS = [FOUR, MORE_FOUR, EIGHT]
"""Rows that are counted in one start of processes."""


@cache
def counted(which: int) -> list[list[Any]]:
    """Of every rank, for every row of a set."""
    rows = SETS[which]
    return run_ranks(rows[0].layout.world_size, count, rows, timeout_s=180)


def padded(row: Row) -> int:
    parts = row.layout.token_parts
    return -(-row.tokens // parts) * parts


every_row = pytest.mark.parametrize(
    "row",
    [
        *(pytest.param(row, id=row.id) for row in FOUR),
        *(pytest.param(row, id=row.id, marks=pytest.mark.nightly) for row in MORE_FOUR + EIGHT),
    ],
)


def of_ranks(row: Row) -> list[Any]:
    which = next(index for index, rows in enumerate(SETS) if row in rows)
    return [ranks[SETS[which].index(row)] for ranks in counted(which)]


@every_row
def test_a_block_sends_what_the_formulas_say(row: Row) -> None:
    """Every axis, every operation, every rank; nothing is sent that no formula explains."""
    expected = formulas.layer(
        row.wan, row.layout, row.options, row.zero,
        tokens=padded(row), itemsize=row.dtype.itemsize, micro_batches=row.micro_batches,
        side_block=row.side_block,
    )  # fmt: skip
    for few, more in of_ranks(row):
        found = a_layer(row, few, more)
        assert found.keys() == expected.keys()
        for key, (calls, sent) in found.items():
            assert calls == expected[key].calls, key
            assert sent == pytest.approx(expected[key].bytes, rel=1e-12), (key, sent / expected[key].bytes)


@every_row
def test_a_boundary_is_crossed_once_in_each_direction(row: Row) -> None:
    layout = row.layout
    tokens = padded(row) / layout.token_parts
    each = formulas.boundary(
        tokens, row.wan.image_tokens + row.wan.text_len, row.wan.hidden_size, row.dtype.itemsize,
        side_blocks=bool(row.wan.side_blocks), runs=2 if row.wan.model_type == "ti2v" else 1,  # a clean first frame
    )  # fmt: skip
    for rank, (few, more) in enumerate(of_ranks(row)):
        pp_rank = rank // (layout.world_size // layout.pp_size)
        for found in (few, more):
            pipeline = {key: sent for key, sent in found.items() if key[0] == "pp"}
            expected = formulas.pipeline(layout, pp_rank, each, row.micro_batches) if layout.pp_size > 1 else {}
            assert pipeline == expected


def test_nothing_waits_for_the_whole_device_and_no_group_is_unknown() -> None:
    for ranks in counted(0):
        for few, more in ranks:
            assert {"other", "barrier"} & {word for key in (*few, *more) for word in key} == set()
