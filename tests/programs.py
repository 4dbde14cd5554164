"""Commands of this package as processes that are forked from the tests' server, which has imported what they need.

For tests of what a command does among others, which stop it, signal it or kill it, or which need a process of its own
for what it leaves in one. How Python itself is started is the matter of those that start `python -m`, for seconds of
imports each.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ranks import start_server

from mm.cli.entry import run

Main = Callable[[Sequence[str]], None]


class Forked:
    """`function(*args)` in a process of its own, with the methods of `subprocess.Popen`.

    Args:
        function: importable; its result is the process's exit code, as `sys.exit` takes it.
        folder: where standard output and standard error go, to files of these names; None for those of this process.
        at: the current folder; None for that of this process.
    """

    def __init__(
        self, function: Callable[..., Any], *args: Any, folder: Path | None = None, at: Path | None = None
    ) -> None:
        start_server()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_leave, args=(folder, at, function, args))
        self._process.start()
        self._folder = folder

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Minus the number of a signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        assert self.returncode is not None, f"it has not ended in {timeout} s"
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing, where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self, stream: str = "stderr") -> str:
        """What it has written so far."""
        assert self._folder is not None
        return (self._folder / stream).read_text()

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()


def command(main: Main, words: Sequence[str], folder: Path | None = None) -> Forked:
    """A command of `mm.cli`, which ends as the command does."""
    return Forked(run, main, list(words), folder=folder)


def as_script(path: str, *words: str) -> None:
    """Run a file as `python PATH WORDS` would."""
    sys.argv[:] = [path, *words]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def _leave(folder: Path | None, at: Path | None, function: Callable[..., Any], args: Sequence[Any]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a server that readers started blocks what a shell would not
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    if folder is not None:
        for number, name in ((1, "stdout"), (2, "stderr")):
            opened = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, number)
            os.close(opened)
    if at is not None:
        os.chdir(at)
    import torch

    torch.set_num_threads(1)
    sys.exit(function(*args))
