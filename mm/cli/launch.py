"""`python -m mm.cli.launch TORCHRUN_FLAGS -m MODULE ...`: torchrun, with an end that schedulers and readers understand.

torchrun leaves with exit code 1 whatever happened, and hands on no SIGUSR1. Started through this module a job leaves
with the exit code of its first failure (docs/errors.md), whose message is the last line and printed once, and SIGTERM
and SIGUSR1 reach every process of the node, which then has the time it needs to save.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mm.cli.entry import run
from mm.parallel.torchrun import torchrun


def main(argv: Sequence[str]) -> None:
    """Run torchrun with these words.

    Raises:
        SystemExit: with the exit code of the job on this node.
        ConfigError: CFG-150, CFG-152 for a meeting place that cannot be, or that anybody could use.
    """
    sys.exit(torchrun(argv))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
