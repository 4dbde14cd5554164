"""Samples that share a sequence get the losses, gradients, norms and weights of one process that computes each alone.

The comparison and its limits are those of the parity matrix (`test_parity`).
"""

import pytest
from matrix import Matrix
from packed_rows import ROWS
from parity import Row

EVERY_DAY = [row for row in ROWS if row.layout.world_size <= 2]
"""The others are nightly."""

MATRIX = Matrix(ROWS, EVERY_DAY)


@pytest.mark.parametrize("row", MATRIX.cases())
def test_equals_one_process(row: Row) -> None:
    MATRIX.check(row)
