"""torchrun with the job's own exit code and last line; `mm.cli.launch` says why."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import DistError, DistNetworkError
from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from mm.errors import (
    EXIT_STOPPED,
    LAUNCHER,
    ConfigError,
    LostProcessError,
    MMError,
    SignalledError,
    StoppedError,
    say,
)
from mm.isolated import command_of
from mm.stopping import AGAIN, AGAIN_S, CLOSE, LEAVE_S, SIGNALS, SignalListener
from mm.supervise.fingerprint import CHECK_NODES
from mm.supervise.rendezvous import prepare_launch

_NO_STEP = "while no step was running"
_UNSAVED = "Nothing was saved since the newest checkpoint."
_LOST = "error RUN-004"
_CRASHED = "A library has crashed: read the lines above and the kernel's log of this node."
_SENT = "Somebody sent it that signal, or it came to a limit of the system (ulimit -a). The same command goes on."
_REMEDIES: dict[int, str] = {
    **dict.fromkeys((signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE), _CRASHED),
    signal.SIGKILL: "Read the kernel's log of this node: memory is the usual cause, unless somebody ended it on "
    "purpose.",
    signal.SIGABRT: "Read its last lines above: a library ended it. Torch's watchdog over NCCL does so when another "
    "rank is gone or hangs in a collective.",
}


def torchrun(argv: Sequence[str]) -> int:
    """Run torchrun in this process.

    Args:
        argv: its flags, then what it starts.

    Returns:
        The exit code of the job on this node.

    Raises:
        ConfigError: CFG-140 when another job has the port, CFG-091 when the nodes do not meet, and what
            `prepare_launch` raises.
    """
    os.environ[LAUNCHER] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it reports is told better below
    arguments = parse_args(list(argv))
    _isolate(arguments)
    arguments.signals_to_handle = "SIGQUIT"  # the others are handed on
    handing_on = _HandingOn(saves="--save-on-signal" in argv)
    # torchrun takes no agent as an argument
    multiprocessing.api._get_default_signal = lambda: CLOSE  # nor for what it ends processes with: no request to stop
    api.LocalElasticAgent = partial(_Agent, handing_on.has_begun)  # type: ignore[attr-defined, assignment]
    try:
        with SignalListener(handing_on.on_signal, handing_on.look):
            arguments.store = prepare_launch(arguments)  # kept as long as they are; torchrun finds it by its port
            run(arguments)
    except ChildFailedError as error:
        return _tell(error, handing_on)
    except SignalException as error:
        quit_at_once = SignalledError(
            "RUN-010", f"Ended at once by {error.sigval.name} to the launcher. {_UNSAVED}", AGAIN
        )
        say(quit_at_once)
        return 128 + error.sigval
    except DistError as error:
        raise _no_meeting(arguments, error) from None
    return 0


def _isolate(arguments: argparse.Namespace) -> None:
    """Start a module of this package by its path: `python -m` would take the current folder's code for it."""
    module = arguments.training_script
    if arguments.module and module.partition(".")[0] == "mm":
        script, *words = command_of(module)[1:]
        arguments.module, arguments.training_script = False, script
        arguments.training_script_args = [*words, *arguments.training_script_args]


class _Agent(LocalElasticAgent):
    """torchrun's agent; it does not start processes again that were asked to stop."""

    def __init__(self, was_asked: Callable[[], bool], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._was_asked = was_asked

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        stopped = any(failure.exitcode == EXIT_STOPPED for failure in result.failures.values())
        if stopped or self._was_asked():
            self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = CLOSE, timeout: int = 30) -> None:
        super()._shutdown(death_sig, timeout)


class _HandingOn:
    """Signals of the launcher, handed on to every process of the node, copies left out."""

    def __init__(self, saves: bool) -> None:
        self.saves = saves
        self.first: signal.Signals | None = None
        self._first_at = 0.0
        self._deadline = float("inf")

    def has_begun(self) -> bool:
        """True once the job was asked to stop."""
        return self.first is not None

    def on_signal(self, number: signal.Signals) -> None:
        """Hand on the first signal, and one that is meant as another."""
        now = time.monotonic()
        if number == CLOSE:
            return
        if self.first is not None and now - self._first_at <= AGAIN_S:
            return
        processes = psutil.Process().children()
        if not processes:  # torchrun waits for other nodes, in a library
            error = _ended_by(number) if not self.saves else _stopped_by(number)
            say(error)
            os._exit(error.exit_code)
        if self.first is not None:
            self._deadline = now + LEAVE_S
        else:
            self.first, self._first_at = number, now
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def look(self) -> None:
        """End processes that did not leave after a second signal."""
        if time.monotonic() > self._deadline:
            for process in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def _tell(error: ChildFailedError, handing_on: _HandingOn) -> int:
    """Print the first failure's own words, or how its process died; returns the exit code."""
    failures = sorted(error.failures.values(), key=_time_of)
    told = [words for failure in failures if (words := _words(failure)) is not None]
    rank, first = next(iter(error.failures.items()))  # in the order in which torchrun found them
    died = first.exitcode < 0 and first.exitcode != -CLOSE and _words(first) is None
    if died and all(text.startswith(_LOST) for text, _ in told):  # what others say of a process they lost is less
        reason = _died(rank, first.pid, signal.Signals(-first.exitcode), handing_on)
        say(reason)
        return reason.exit_code
    if told:
        text, exit_code = told[0]
        print(text, file=sys.stderr, flush=True)
        return exit_code
    return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode  # another node has the reason, and prints it


def _time_of(failure: ProcessFailure) -> float:
    """Time at which the process left its words, or was found dead; torchrun keeps whole seconds."""
    try:
        return Path(failure.error_file).stat().st_mtime
    except OSError:
        return float(failure.timestamp) + 1.0


def _died(rank: int, process_id: int, number: signal.Signals, handing_on: _HandingOn) -> MMError:
    """The error for a process that a signal ended before it could say anything."""
    if handing_on.first is not None:
        return _stopped_by(handing_on.first) if handing_on.saves else _ended_by(handing_on.first)
    if number in SIGNALS:
        return _ended_by(number, f"rank {rank}, process {process_id}")
    found = f"Rank {rank} (process {process_id}) was ended by {number.name}."
    return LostProcessError("RUN-004", found, _REMEDIES.get(number, _SENT))


def _ended_by(number: signal.Signals, what: str = "the launcher") -> SignalledError:
    found = f"Ended by {number.name} to {what} {_NO_STEP}."
    error = SignalledError("RUN-010", found, AGAIN)
    error.exit_code = 128 + number
    return error


def _stopped_by(number: signal.Signals) -> StoppedError:
    return StoppedError("RUN-001", f"Stopped by {number.name} {_NO_STEP}.", AGAIN)


def _no_meeting(arguments: argparse.Namespace, error: DistError) -> ConfigError:
    address = f"{arguments.master_addr}:{arguments.master_port}"
    reason = str(error).splitlines()[0]
    if isinstance(error, DistNetworkError) and "EADDRINUSE" in str(error):
        return ConfigError(
            "CFG-140",
            f"The port {address} is taken: another job of this node has it.",
            "Give this job another one (MASTER_PORT in the scripts; 0 takes a free one), or wait for that job to end.",
        )
    message = f"The nodes of the job do not meet at {address}: {reason}"
    return ConfigError("CFG-091", message, CHECK_NODES)


def _words(failure: ProcessFailure) -> tuple[str, int] | None:
    """Message that the process left in its error file, and the exit code that it was about to leave with.

    torchrun may have ended it meanwhile, because another process was faster; its own exit code says only that then.
    """
    try:
        told = json.loads(Path(failure.error_file).read_text())["message"]
        return str(told["message"]), int(told["errorCode"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
