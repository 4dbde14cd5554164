"""The pipeline's bubble: `python benchmarks/bubble.py` prints a markdown table.

megatron-core's schedules run for real on four gloo processes; the order of their forwards and backwards is replayed
with unit times (a block's forward 1, its backward 2) and stands beside the formula.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "parallel")]

import recorded_schedule as recorded  # noqa: E402  (the path above)
from recorded_schedule import Case  # noqa: E402

from mm.config.layout import even_stages  # noqa: E402

CASES = [
    *(Case(even_stages(8, 2), m) for m in (4, 8)),
    *(Case(even_stages(8, 4), m) for m in (4, 8)),
    *(Case(even_stages(8, 2, 2), m) for m in (4, 8)),
    *(Case(even_stages(8, 4, 2), m) for m in (4, 8)),
    Case(((3, 5),), 8),
    Case(((5, 3),), 8),
    Case(((1, 2, 2, 3),), 8),
    Case(((1, 3, 3, 1),), 8),
    Case(((1, 2), (3, 2)), 8),
]


def row(case: Case, orders: recorded.Orders) -> str:
    """One line of the table."""
    even = len(set(case.blocks)) == 1
    formula = f"{float(recorded.even_bubble(case)):.1%}" if even else "-"
    peaks = ", ".join(str(recorded.peak_in_flight(order)) for order in orders)
    ranks = [sum(stage[rank] for stage in case.stages) for rank in range(case.pp_size)]
    slowest = max(ranks) * case.pp_size / sum(ranks)
    found = f"{float(recorded.bubble(case, orders)):.1%}"
    return f"| {case.name} | {found} | {formula} | {slowest:.3f} | {peaks} |"


def main() -> None:
    """Record, replay, print."""
    orders = recorded.record(4, CASES)
    lines = [
        "| pipeline, micro-batches | bubble, recorded | (p-1)/(vm+p-1) | slowest rank / mean | in flight by rank |",
        "| --- | --- | --- | --- | --- |",
        *(row(case, orders[case.name]) for case in CASES),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
