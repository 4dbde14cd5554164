"""Models of the Wan family on every axis give the losses, gradients, norms and weights of one process.

The comparison and its limits are those of the parity matrix (`test_parity`).
"""

import pytest
from family_rows import EVERY_DAY, ROWS
from matrix import Matrix
from parity import Row

MATRIX = Matrix(ROWS, EVERY_DAY)


@pytest.mark.parametrize("row", MATRIX.cases())
def test_equals_one_process(row: Row) -> None:
    MATRIX.check(row)
