"""`accelerate launch WORDS SCRIPT ...` without accelerate: torchrun, with accelerate's words and variables.

scripts/launcher/accelerate starts this module, so that with that folder in PATH the commands of VideoX-Fun's guides run
as they stand, those with DeepSpeed too, which accelerate itself starts only where DeepSpeed is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from mm.cli import launch
from mm.cli.entry import run
from mm.dialects.videox_fun.accelerate import read_launch_words
from mm.errors import ConfigError

_OF_MACHINES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables that the guide exports for machines, and that torchrun gives each process anew."""


def main(argv: Sequence[str]) -> None:
    """Start the script; the first word is `launch`.

    Raises:
        ConfigError: CFG-350 for another word, and what `read_launch_words` raises.
        SystemExit: with the exit code of the job on this machine.
    """
    if list(argv[:1]) != ["launch"]:
        found = f"accelerate {argv[0]} is not here." if argv else "No word follows accelerate."
        raise ConfigError("CFG-350", found, "accelerate launch FLAGS SCRIPT WORDS is.")
    launched = read_launch_words(argv[1:], _devices())
    for name in _OF_MACHINES:
        os.environ.pop(name, None)
    os.environ.update(launched.variables)
    launch.main(launched.torchrun)


def _devices() -> int:
    from mm.device.backend import visible_devices  # torch takes seconds

    return visible_devices()


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
