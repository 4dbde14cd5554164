"""`python -m mm.cli.launch TORCHRUN_FLAGS -m MODULE ...`: torchrun, with an end that schedulers and readers understand.

torchrun leaves with exit code 1 whatever happened, and hands on no SIGUSR1. Started through this module a job leaves
with the exit code of its first failure (docs/errors.md), whose message is the last line and printed once, and SIGTERM
and SIGUSR1 reach every process of the node, which then has the time it needs to save.
"""

from __future__ import annotations

import sys

from mm.parallel.torchrun import torchrun

if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
