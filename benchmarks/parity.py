"""Prints the parity table of docs/parallelism.md from what the parity tests recorded:

MM_PARITY_TABLE=parity.jsonl python -m pytest -q tests/parallel/test_parity.py
python benchmarks/parity.py parity.jsonl
"""

import json
import sys
from pathlib import Path


def table(lines: list[str]) -> str:
    """Markdown of the recorded rows, one JSON object a line; of a layout recorded twice the later one counts."""
    rows = {(row["processes"], row["layout"]): row for row in map(json.loads, lines)}
    out = [
        "| processes | layout | loss | worst gradient | of | gradient norm | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    out += [
        f"| {processes} | `{layout}` | {row['loss']:.0e} | {row['gradient']:.1e} | `{row['worst_gradient']}` "
        f"| {row['norm']:.0e} | {row['weight']:.0e} |"
        for (processes, layout), row in rows.items()
    ]
    return "\n".join(out)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()))
