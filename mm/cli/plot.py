"""`mm plot RUN`: a run's metrics as a PNG."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.cli.entry import run
from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_file


class PlotFlags(Flags):
    """Draw loss, gradient norm, learning rate, throughput and memory of a run, and its losses by timestep.

    `mm plot RUN` is `mm plot --run RUN`.
    """

    run: str = Field(description="the run's folder (SAVE_PATH), which holds metrics.jsonl")
    out: str | None = Field(None, description="the PNG to write; default: RUN/metrics.png")


def main(argv: Sequence[str]) -> None:
    """Draw the plot and say where it is."""
    words = ["--run", *argv] if argv and not argv[0].startswith("-") else argv
    flags = parse_flags(PlotFlags, words, program="mm plot")
    folder = Path(flags.run)
    out = Path(flags.out) if flags.out else folder / "metrics.png"
    if flags.out is not None:
        require_writable_file(out, "--out")
    from mm.doctor.plot import plot_run  # matplotlib, and torch

    target = plot_run(folder, out)
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
