"""torchrun with the job's own exit code and last line; `mm.cli.launch` says why."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import parse_args, run

from mm.errors import LAUNCHER, LostProcessError, say
from mm.parallel.meeting import prepare_launch

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)

_MEMORY = "Read the kernel's log of this node: memory is the usual cause."
_REMEDIES: dict[int, str] = {
    signal.SIGABRT: "Read its last lines above: a library ended it. Torch's watchdog over NCCL does so when another "
    "rank is gone or hangs in a collective."
}


def torchrun(argv: Sequence[str]) -> int:
    """Run torchrun in this process.

    Args:
        argv: its flags, then what it starts.

    Returns:
        The exit code of the job on this node.
    """
    os.environ[LAUNCHER] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it reports is told better below
    arguments = parse_args(list(argv))
    arguments.store = prepare_launch(arguments)  # kept as long as they are; torchrun finds it by its port
    arguments.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in HANDED_ON:
        signal.signal(number, _hand_on)
    try:
        run(arguments)
    except ChildFailedError as error:
        return _tell(error)
    return 0


def _hand_on(number: int, frame: FrameType | None) -> None:
    for process in psutil.Process().children():
        process.send_signal(number)


def _tell(error: ChildFailedError) -> int:
    """Print the first failure's own words, or how its process died; returns the exit code."""
    failures = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
    for _, failure in failures:
        words = _words(failure)
        if words is not None:
            text, exit_code = words
            print(text, file=sys.stderr, flush=True)
            return exit_code
    rank, failure = failures[0]
    if failure.exitcode >= 0:  # another node has the reason, and prints it
        return failure.exitcode
    found = f"Rank {rank} (process {failure.pid}) was ended by {signal.Signals(-failure.exitcode).name}."
    lost = LostProcessError("RUN-004", found, _REMEDIES.get(-failure.exitcode, _MEMORY))
    say(lost)
    return lost.exit_code


def _words(failure: ProcessFailure) -> tuple[str, int] | None:
    """What the process left in its error file: its message and the exit code that it was about to leave with.

    torchrun may have ended it meanwhile, because another process was faster; its own exit code says only that then.
    """
    try:
        told = json.loads(Path(failure.error_file).read_text())["message"]
        return str(told["message"]), int(told["errorCode"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
