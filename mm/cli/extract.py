"""`mm extract`, or `torchrun -m mm.cli.extract` for several processes: encode videos and captions to features."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.cli.extraction import extract_features
from mm.config.flags import words_of_process
from mm.config.place import process_place
from mm.dialects.mindspeed.extraction import read_extraction


def main(argv: Sequence[str]) -> None:
    """Run this process's part of the extraction; raises what `mm.cli.extraction.extract_features` raises."""
    where = process_place()
    extract_features(read_extraction(argv, where.world_size), where)


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
