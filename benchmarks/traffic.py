"""What a block sends: `python benchmarks/traffic.py` prints the markdown table of docs/parallelism.md.

Each layout runs for real on four or eight gloo processes, once with one block on every stage and once with two. What
the second block adds, counted at the collectives of rank 0 in one step of two micro-batches, stands beside the closed
formula for the sample's own tokens, so that the ratio shows the padding. Gradients of replicas are shown where nothing
else is sent (they are the same everywhere); the norm's 4 bytes a parameter are not shown.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parallel")]

from ranks import run_ranks  # noqa: E402  (the path above)
from tabulate import tabulate  # noqa: E402
from traffic_rows import EIGHT, FOUR, MORE_FOUR, Row, a_layer, count  # noqa: E402

from mm.doctor import formulas  # noqa: E402

HEADERS = ["layout", "over", "by", "calls", "bytes counted", "bytes by formula", "ratio"]


def lines(row: Row, found: dict[tuple[str, str], tuple[float, float]]) -> list[list[str]]:
    """The table's lines of one layout."""
    expected = formulas.layer(
        row.wan, row.layout, row.options, row.zero,
        tokens=row.tokens, itemsize=row.dtype.itemsize, micro_batches=row.micro_batches,
        side_block=row.side_block,
    )  # fmt: skip
    return [
        [f"`{row.id}`", axis, operation, f"{calls:g}", f"{sent:,.0f}", f"{expected[axis, operation].bytes:,.0f}",
         f"{sent / expected[axis, operation].bytes:.3f}"]
        for (axis, operation), (calls, sent) in found.items()
        if axis != "world" and (calls or row.layout.token_parts * row.layout.tp_size == 1)
    ]  # fmt: skip


def main() -> None:
    """Run, count, print."""
    table = []
    for world_size, rows in ((4, FOUR + MORE_FOUR), (8, EIGHT)):
        for row, (few, more) in zip(rows, run_ranks(world_size, count, rows, timeout_s=400)[0], strict=True):
            table += lines(row, a_layer(row, few, more))
    print(tabulate(table, headers=HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
