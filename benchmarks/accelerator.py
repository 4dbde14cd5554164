"""Benchmarks of one accelerator (CUDA or NPU): `python benchmarks/accelerator.py a1 [a2 ...] [--json FILE]`, or `all`.

a1 a2 a3  a training step of Wan2.1 1.3B at 480x832x81: full recomputation, attention kept, nothing recomputed
b1 b2     a training step of a LoRA (r 64) of 14B at 480x832x81: full recomputation, attention kept
c1        a training step of eight blocks of 14B, by mode
d1 d2 d3  attention by implementation; bandwidth of the elementwise operators; copies to and from host memory
e1        diffusers doing a1's work

Each takes at most about three minutes. Results are compared with fp32 references on fresh random numbers before
anything is timed; then come warm-up runs and the median of ten, or of fewer where time is short, as the table says.
`--tiny` runs the same code on the CPU with tiny shapes, to see that it runs, and shows no times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from accel_bench import Bench  # noqa: E402  (the path above)
from accel_parts import d1, d2, d3  # noqa: E402
from accel_steps import a1, a2, a3, b1, b2, c1, e1  # noqa: E402
from results import Result, arguments, write  # noqa: E402

from mm.config.layout import Layout  # noqa: E402
from mm.config.place import process_place  # noqa: E402
from mm.device.backend import select  # noqa: E402
from mm.parallel.mesh import build_mesh  # noqa: E402
from mm.supervise.job import Job  # noqa: E402

COMMANDS: dict[str, Callable[[Bench], Result]] = {
    "a1": a1, "a2": a2, "a3": a3, "b1": b1, "b2": b2, "c1": c1, "d1": d1, "d2": d2, "d3": d3, "e1": e1,
}  # fmt: skip
TIMEOUT_MINUTES = 5


def main() -> None:
    """Run what was asked for; results are shown and written as they come."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("command", nargs="+", choices=[*COMMANDS, "all"])
        parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, no times")

    options = arguments(__doc__, add)
    backend = select("cpu" if options.tiny else None)
    if backend.kind == "cpu" and not options.tiny:
        raise SystemExit(
            "These benchmarks measure an accelerator, and this process sees none (CUDA or NPU). "
            "Run them on one, or add --tiny to see on the CPU that they run."
        )
    results: list[Result] = []
    with (
        Job(process_place(), backend.collective, backend.device, TIMEOUT_MINUTES),
        build_mesh(Layout(), TIMEOUT_MINUTES, backend.kind) as mesh,
    ):
        bench = Bench(backend, mesh, options.tiny)
        for name in COMMANDS if "all" in options.command else dict.fromkeys(options.command):
            bench.begin()
            results.append(COMMANDS[name](bench))
            results[-1].show()
            write(results, options.json)


if __name__ == "__main__":
    main()
