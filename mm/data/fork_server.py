"""The server that readers are forked from, started so that neither a signal nor the current folder reaches it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType

from mm.isolated import ROOT, absolute_words
from mm.stopping import CLOSE, SIGNALS

SENT_TO_ALL = (*SIGNALS, CLOSE)
"""Signals that are sent to whole groups of processes; what they mean to a reader its parent decides."""
_CLEAN_PATH = "mm.data.server_path"


def ensure_fork_server(preload: Sequence[str]) -> None:
    """Start the server unless it runs.

    Args:
        preload: modules that it imports once for all that are forked from it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([_CLEAN_PATH, *preload])
    # What is blocked here stays blocked in the server. It takes seconds to import, and has no handlers in that time.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)
    try:
        with _without_the_current_folder():
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)  # which has let some of them through again
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def without_main() -> Iterator[None]:
    """Have processes started here begin without the user's script.

    multiprocessing runs it once more in each of them, for what it defines; nothing that they are sent is defined there,
    and a script that calls this package would begin its work anew.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _without_the_current_folder() -> Iterator[None]:
    """The server is `python -c`, which looks into the current folder first (`mm.isolated`), and must find this package.

    Python before 3.11 has no variable against it, so there the server starts in a folder that nobody else writes to;
    processes forked from it go to their parent's folder by themselves.
    """
    words = [ROOT, *absolute_words(os.environ.get("PYTHONPATH", ""))]
    variables = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(words)}
    before = {name: os.environ.get(name) for name in variables}
    here = os.getcwd() if sys.version_info < (3, 11) else None
    os.environ.update(variables)
    try:
        if here is not None:
            os.chdir(Path(sys.base_prefix))
        yield
    finally:
        if here is not None:
            os.chdir(here)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
