"""`mm generate`, or `torchrun -m mm.cli.generate` for several processes: makes a clip for each prompt of a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.cli.generation import generate
from mm.config.flags import words_of_process
from mm.config.place import process_place
from mm.dialects.mindspeed.generate import read_generation


def main(argv: Sequence[str]) -> None:
    """Run this process's part of the command with the words after its name; raises what `generate` raises."""
    where = process_place()
    generate(read_generation(argv, where.world_size), where)


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
