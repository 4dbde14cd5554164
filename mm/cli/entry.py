"""Start and end of every command: logging, one line for each error, exit codes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from mm.cli.console import unbreakable_output
from mm.errors import DiskError, EndedElsewhereError, InternalError, MMError, OutputError, say
from mm.first_process import leave_the_first_place


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run a command and return the exit code of the process.

    Args:
        main: the command; takes the words after its name, returns nothing, raises `MMError` for what a user can mend.
        argv: the words after the command's name.
    """
    _open_closed_streams()
    leave_the_first_place()
    with unbreakable_output() as output:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
        _quieten_libraries()
        _close_standard_input()
        exit_code = _ended(main, argv)
        refused = [console.failed for console in output if console.failed is not None]
        if refused and exit_code == 0:
            remedy = "Free its disk and run the command again."
            error = OutputError("RUN-012", f"Standard output is not whole: {refused[0]}.", remedy)
            say(error)
            return error.exit_code
    return exit_code


def _ended(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    try:
        main(argv)
    except MMError as error:
        say(error)
        return error.exit_code
    except EndedElsewhereError as error:
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        told = _refused(error)
        if told is None:
            traceback.print_exc()
            remedy = "This is a defect of the program: please report it, with the lines above."
            told = InternalError("RUN-005", f"{type(error).__name__}: {error}", remedy)
        say(told)
        return told.exit_code
    return 0


def _refused(error: Exception) -> MMError | None:
    """The error to tell where a full disk, or no folder for temporary files, ended a command anywhere in a library."""
    if not isinstance(error, OSError):
        return None
    nowhere = "No usable temporary directory" in str(error)  # all of them are full, or cannot be written
    if not nowhere and error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    what = f"{error.filename or 'A temporary file'} cannot be written"
    return DiskError(
        "RUN-021",
        f"{what}: {error.strerror} (TMPDIR is {os.environ.get('TMPDIR', 'not set')}).",
        "Free space and inodes there, or set TMPDIR to a folder on another disk; the same command goes on.",
    )


def _quieten_libraries() -> None:
    """Keep the console for what concerns the user.

    megatron-core logs every parameter's bucket and warns at import of each optional package that is absent; torch warns
    of megatron-core's use of renamed collectives, and of layers sharded by FSDP2 whose output somebody might change in
    place: linear layers return such views, and nothing here writes into them. None of it can be acted upon. Warnings of
    everything else stay.
    """
    for name in ("megatron", "megatron_fsdp"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for line in (r"megatron\b", r"torch\.distributed\.c10d_logger"):
        warnings.filterwarnings("ignore", module=line)
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")


def _open_closed_streams() -> None:
    """Give what was closed by whoever started this process a number's worth of nothing.

    Another file would get the number otherwise, and libraries that write to standard error would write into that.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the smallest number that is free


def _close_standard_input() -> None:
    """Let whoever reads standard input find its end: no command reads it, and libraries that ask there must not wait.

    transformers asks there whether to run code of a folder, and takes any "y" for an answer.
    """
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(nothing, 0)
    finally:
        os.close(nothing)
