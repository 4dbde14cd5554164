"""`python PATH/mm/isolated.py MODULE WORDS...`: as `python -m MODULE WORDS...`, without the current folder's code.

`python -m` and `python -c` look into the current folder first: a data folder that holds a `torch.py`, a `yaml.py` or a
folder `mm/` would be run in place of the real ones. The scripts, the launcher and everything else that starts a process
of this package start this file by its path. Python's own switches do not serve: -P came with 3.11, and -I also ignores
PYTHONPATH, through which toolkits of accelerators are found. Nothing but `os` and `sys`, which Python itself has
imported by then, may be imported before `sys.path` is clean.
"""

from __future__ import annotations

import os
import sys

PACKAGE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(PACKAGE)


def trusted_path(path: list[str], pythonpath: str) -> list[str]:
    """Entries of `sys.path` that lead to the interpreter, to what is installed, and to folders named in full.

    Left out are the current folder, also where an empty or relative word of PYTHONPATH means it, and the folder of this
    file. The checkout comes last: what lies beside its packages stands in for nothing that is installed.

    Args:
        path: `sys.path` as Python made it.
        pythonpath: the variable PYTHONPATH.
    """
    named = absolute_words(pythonpath)
    relative = {os.path.abspath(word) for word in pythonpath.split(os.pathsep) if pythonpath and word not in named}
    left_out = {"", PACKAGE, os.path.realpath(PACKAGE), ROOT} | relative - set(named)
    return [*(entry for entry in path if entry not in left_out), ROOT]


def absolute_words(pythonpath: str) -> list[str]:
    """The words of PYTHONPATH that do not depend on the current folder."""
    return [word for word in pythonpath.split(os.pathsep) if os.path.isabs(word)]


def command_of(module: str) -> list[str]:
    """The first words of a command that runs a module of this package as this file does."""
    return [sys.executable, os.path.join(PACKAGE, "isolated.py"), module]


def clean_path() -> None:
    """Leave what `trusted_path` leaves out, in this process and in those that it starts."""
    pythonpath = os.environ.get("PYTHONPATH", "")
    sys.path[:] = trusted_path(sys.path, pythonpath)
    os.environ["PYTHONPATH"] = os.pathsep.join(absolute_words(pythonpath))
    os.environ["PYTHONSAFEPATH"] = "1"  # -P for processes that libraries start, where Python knows it


def _run(words: list[str]) -> None:
    clean_path()
    import importlib.util
    import runpy

    # This checkout's package, whichever is installed.
    spec = importlib.util.spec_from_file_location("mm", os.path.join(PACKAGE, "__init__.py"))
    assert spec is not None and spec.loader is not None  # noqa: S101  it is a file of this folder
    package = importlib.util.module_from_spec(spec)
    sys.modules["mm"] = package
    spec.loader.exec_module(package)
    from mm.first_process import leave_the_first_place

    leave_the_first_place()  # before imports that take seconds
    sys.argv[:] = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run(sys.argv[1:])
