"""`mm train`: a command line of MindSpeed-MM's words, trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.cli.training import train
from mm.dialects.mindspeed.accepted_flags import take_accepted
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import read_files, read_flags, translate


def main(argv: Sequence[str]) -> None:
    """Train; raises what `mm.cli.training.train` raises."""
    flags, accepted = read_flags(TrainFlags, argv, "mm train"), take_accepted(argv)[1]
    train(
        lambda where: translate(flags, read_files(flags, accepted), where.world_size),
        saves=flags.save_on_signal,
        word="--save-on-signal",
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
