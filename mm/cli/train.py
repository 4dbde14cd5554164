"""`mm train`: a command line of MindSpeed-MM's words, trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm.cli.entry import run
from mm.cli.training import train
from mm.dialects.mindspeed.reading import Reading
from mm.dialects.mindspeed.train_flags import TrainFlags
from mm.dialects.mindspeed.training import read_files, read_flags, translate

if TYPE_CHECKING:  # torch comes later
    from mm.train.callbacks.base import Callback
    from mm.train.sinks.base import Sink


def main(argv: Sequence[str], callbacks: Sequence[Callback] = (), sinks: Sequence[Sink] = ()) -> None:
    """Train; raises what `mm.cli.training.train` raises.

    Args:
        argv: the words after the command's name. callbacks, sinks: of a script around this command.
    """
    reading = Reading()
    flags = read_flags(TrainFlags, argv, "mm train", reading)
    train(
        lambda where: translate(flags, read_files(flags, reading), where.world_size),
        saves=flags.save_on_signal is True,
        word="--save-on-signal",
        callbacks=callbacks,
        sinks=sinks,
    )


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
