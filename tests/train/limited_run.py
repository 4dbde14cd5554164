"""`mm train` in a process whose memory may only grow so far: python limited_run.py MB RANK WORDS...

The limit is set on the process of one rank when it has joined the job: the size of imports, and the stacks of gloo's
threads, are not what a test is about.
"""

import os
import re
import resource
import sys
from pathlib import Path
from typing import Any

from mm.cli.entry import run
from mm.cli.train import main
from mm.train import loop
from mm.train.run import Run
from mm.train.state import Progress


def limit(more_bytes: int) -> None:
    """Let anonymous memory grow by that much and no further."""
    now = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert now is not None
    resource.setrlimit(resource.RLIMIT_DATA, (int(now[1]) * 1024 + more_bytes, resource.RLIM_INFINITY))


def limited(megabytes: int, rank: str, words: list[str]) -> int:
    """`mm train` with that limit on the process of one rank; returns the exit code."""
    train = loop.train

    def limited_train(this_run: Run, *around: Any) -> Progress:
        if os.environ.get("RANK", "0") == rank:
            limit(megabytes * 10**6)
        return train(this_run, *around)

    loop.train = limited_train
    return run(main, words)


if __name__ == "__main__":
    sys.exit(limited(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
