"""The one exception family of the project: an id, what was found, what to do, and the exit code of the process.

Every error that a user can cause is raised as one of the classes below, so that the command line prints one line
for it (`format_error`) and leaves with a code that a launcher can act on. A traceback means a defect in this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

EXIT_NUMERICS = 17
EXIT_REPLICAS = 18
EXIT_CONFIG = 64
EXIT_DATA = 65
EXIT_INTERNAL = 70
EXIT_MEMORY = 71
EXIT_CHECKPOINT = 74
EXIT_STOPPED = 75
EXIT_HANG = 124


_ESCAPED = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        id: stable identifier such as `CFG-012`, documented in docs/errors.md.
        message: what was found and what was expected, in one sentence, naming the flag, file or tensor.
        remedy: what the user can do about it, in one sentence.
    """

    id: str
    message: str
    remedy: str

    def __str__(self) -> str:
        """One line, whatever the names in it hold: line ends and terminals' commands stand as `\\n`, `\\x1b`."""
        return f"{self.id}: {self.message} Fix: {self.remedy}".translate(_ESCAPED)


class MMError(Exception):
    """Base of all errors a user can cause. Carries at least one `Problem` and the exit code of the process."""

    exit_code = EXIT_INTERNAL

    def __init__(self, id: str, message: str, remedy: str) -> None:
        self.problems: tuple[Problem, ...] = (Problem(id, message, remedy),)
        super().__init__(str(self.problems[0]))

    @property
    def id(self) -> str:
        """Identifier of the first problem."""
        return self.problems[0].id

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (data workers); the default reduction would call __init__ with one argument.
        return _rebuild, (type(self), self.problems)


class ConfigError(MMError):
    """A flag, a configuration file or a combination of them that cannot work. Carries all problems found at once."""

    exit_code = EXIT_CONFIG


class DataError(MMError):
    """A video, caption, feature file or weight folder that cannot be used."""

    exit_code = EXIT_DATA


class DataWriteError(DataError):
    """A feature, list or clip that cannot be written."""


class CheckpointError(MMError):
    """A checkpoint that cannot be read, written or matched with the model."""

    exit_code = EXIT_CHECKPOINT


class ResumeError(CheckpointError):
    """A whole checkpoint that this run's configuration does not fit: starting the same command again cannot help."""

    exit_code = EXIT_CONFIG


class OutputError(MMError):
    """A report that could not be printed in full."""

    exit_code = EXIT_CHECKPOINT


class DiskError(MMError):
    """A disk or another store of the system that is full, where no checkpoint was concerned."""

    exit_code = EXIT_CHECKPOINT


class OutOfMemoryError(MMError):
    """A device without room for what the run asks of it."""

    exit_code = EXIT_MEMORY


class NumericsError(MMError):
    """A loss or gradient that is not finite."""

    exit_code = EXIT_NUMERICS


class DifferenceError(MMError):
    """Two runs, or a layout and one device, that compute other numbers than each other."""

    exit_code = EXIT_NUMERICS


class ReplicaError(MMError):
    """Copies of the weights that have parted."""

    exit_code = EXIT_REPLICAS


class StoppedError(MMError):
    """A run that was asked to stop and has saved what it had; started again it goes on."""

    exit_code = EXIT_STOPPED


class SignalledError(MMError):
    """A run that a signal ended before it had saved; the exit code is 128 and the signal's number, as in shells."""


class LostProcessError(MMError):
    """Another process of the job died without a word."""

    exit_code = EXIT_CHECKPOINT


class HangError(MMError):
    """A job in which no process makes progress."""

    exit_code = EXIT_HANG


class RestartError(MMError):
    """A job that a launcher started again although that cannot help; the exit code is that of the start before."""


class InternalError(MMError):
    """A defect of this program."""


class EndedElsewhereError(Exception):
    """Another process of the job has failed, and prints why; this one leaves with the same exit code and no word."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(f"another process failed with exit code {exit_code}")


def raise_all(error_type: type[MMError], problems: Sequence[Problem]) -> None:
    """Raise one error that carries all `problems`, or return when there are none."""
    if problems:
        raise _rebuild(error_type, tuple(problems))


def format_error(error: MMError) -> str:
    """The text a user sees: one line for each problem, its id first and the remedy last."""
    return "\n".join(f"error {problem}" for problem in error.problems)


LAUNCHER = "MM_LAUNCHER"
"""Environment variable: the process id of `mm.cli.launch`, which prints the last word of the job's first failure."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: where a process leaves the reason of its end, as JSON."""


def say(error: MMError) -> None:
    """Print an error on standard error; under `mm.cli.launch`, leave it for that to print when all processes ended.

    Where the launcher is gone, that is what all its processes stop for, and the first of the node says it.
    """
    launcher_lives = _launcher_lives()
    file = os.environ.get(ERROR_FILE)
    if launcher_lives and file:
        details = {"timestamp": str(int(time.time())), "py_callstack": ""}
        message = {"message": format_error(error), "errorCode": error.exit_code, "extraInfo": details}
        try:
            Path(file).write_text(json.dumps({"message": message}))
            return
        except OSError:
            pass  # then it is printed here
    stops_with_launcher = launcher_lives is False and isinstance(error, StoppedError | SignalledError)
    if stops_with_launcher and os.environ.get("LOCAL_RANK") != "0":
        return
    print(format_error(error), file=sys.stderr, flush=True)


def _launcher_lives() -> bool | None:
    """Look whether the launcher of this process is there; None for a process that has none."""
    launcher = os.environ.get(LAUNCHER, "")
    if not launcher.isdecimal() or int(launcher) == os.getpid():
        return None
    try:
        os.kill(int(launcher), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return os.getppid() != 1  # dead, but not waited for: its children are those of init


def _rebuild(error_type: type[MMError], problems: tuple[Problem, ...]) -> MMError:
    error = error_type.__new__(error_type)
    error.problems = problems
    Exception.__init__(error, "\n".join(map(str, problems)))
    return error
