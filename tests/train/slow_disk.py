"""`mm train` with a disk that takes its time to make files durable: python slow_disk.py SECONDS WORDS...

Every fsync of a checkpoint's thread waits so long before it returns, as on a busy network disk.
"""

import os
import sys
import threading
import time

from mm.cli.entry import run
from mm.cli.train import main

if __name__ == "__main__":
    seconds, *words = sys.argv[1:]
    fsync = os.fsync

    def slow_fsync(file: int) -> None:
        fsync(file)
        if threading.current_thread().name.startswith("save of step"):
            time.sleep(float(seconds))

    os.fsync = slow_fsync
    sys.exit(run(main, words))
