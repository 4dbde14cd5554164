"""Places to write to, looked at before any work begins. Nothing is made or changed."""

from __future__ import annotations

import os
from pathlib import Path

from mm.errors import ConfigError, Problem, raise_all


def require_writable_folder(path: str | Path, name: str) -> None:
    """Refuse a folder that cannot be made or written into.

    Args:
        path: the folder, which need not exist.
        name: the flag or key that says it.

    Raises:
        ConfigError: CFG-131.
    """
    raise_all(ConfigError, _problems(Path(path), f"{name} {path}"))


def require_writable_file(path: str | Path, name: str) -> None:
    """Refuse a file that cannot be made or replaced; arguments as for `require_writable_folder`.

    Raises:
        ConfigError: CFG-131.
    """
    path = Path(path)
    if os.path.isdir(path):  # not Path.is_dir, which raises where a name is too long
        message = f"{name} {path} cannot be written: it is a folder."
        raise ConfigError("CFG-131", message, "Give the name of a file.")
    raise_all(ConfigError, _problems(path.parent, f"{name} {path}"))


def _problems(folder: Path, what: str) -> list[Problem]:
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    fault = None
    if os.path.islink(there) and not os.path.exists(there):
        fault = f"{there} is a link to nothing"
    elif not os.path.isdir(there):
        fault = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        fault = f"{there} may not be written to"
    elif any(len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX") for part in folder.parts):
        fault = "a name in it is too long for the file system"
    if fault is None:
        return []
    return [Problem("CFG-131", f"{what} cannot be written: {fault}.", "Correct the path, or its permissions.")]
