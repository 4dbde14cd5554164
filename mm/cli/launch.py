"""`python -m mm.cli.launch TORCHRUN_FLAGS -m MODULE ...`: torchrun, with an end that schedulers and readers understand.

torchrun leaves with exit code 1 whatever happened, and hands on no SIGUSR1. Started through this module a job leaves
with the exit code of its first failure (docs/errors.md), whose message is the last line and printed once. A signal to
the launcher reaches every process of the node, which then has the time it needs to save.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mm.cli.entry import run
from mm.stopping import StopRequest


def main(argv: Sequence[str]) -> None:
    """Run torchrun with these words.

    Raises:
        SystemExit: with the exit code of the job on this node.
        ConfigError: CFG-140, CFG-091 when the processes of the job cannot meet; CFG-150, CFG-152 for a meeting place
            that cannot be, or that anybody could use.
        StoppedError, SignalledError: a signal came before any process was started.
    """
    # Whether the job saves when it is asked to stop, the launcher's own end before that must say alike.
    with StopRequest(saves=_saves(argv), kept="No process had been started."):
        from mm.supervise.torchrun import torchrun  # torch takes seconds
    sys.exit(torchrun(argv))


def _saves(argv: Sequence[str]) -> bool:
    """Tell whether what is started saves when a signal asks it to stop."""
    if "mm.cli.run" in argv:
        from mm.cli.run import saves_on_signal  # the flags of other commands need no file

        file = argv[argv.index("mm.cli.run") + 1 :]
        return len(file) == 1 and saves_on_signal(Path(file[0]))
    return "--save-on-signal" in argv


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
