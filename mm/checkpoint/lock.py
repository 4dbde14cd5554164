"""One job at a time writes into a checkpoint folder: a lock file that says who does."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from mm.checkpoint.files import write_new
from mm.errors import CheckpointError

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` while inside.

    The lock of a process that is dead, on this host, is taken over. A lock of another host cannot be judged from here
    and is respected.

    Raises:
        CheckpointError: CKPT-034 when another job holds it.
        OSError: the folder cannot be written.
    """
    path = folder / LOCK_NAME
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}
    _acquire(path, mine)
    try:
        yield
    finally:
        if _read(path) == mine:  # someone told us dead by hand may have taken it over
            path.unlink(missing_ok=True)


def _acquire(path: Path, mine: dict[str, Any]) -> None:
    for _ in range(2):
        try:
            # A link gives the lock its name and its content in one step: no one can read it half-written.
            draft = path.with_name(f".tmp-lock-{uuid4().hex[:12]}")
            write_new(draft, json.dumps(mine))
            try:
                os.link(draft, path)
            finally:
                draft.unlink()
            return
        except FileExistsError:
            _remove_if_stale(path)
    raise _held(path, _read(path))


def _remove_if_stale(path: Path) -> None:
    holder = _read(path)
    if holder is None:
        return
    if holder.get("host") != socket.gethostname() or _is_alive(holder):
        raise _held(path, holder)
    log.warning("The lock %s belongs to process %s, which is dead: taking it over.", path, holder.get("pid"))
    # Renamed before it is deleted: of two processes that found it stale, one fails here and none deletes a new lock.
    grave = path.with_name(f".tmp-lock-{uuid4().hex[:12]}")
    try:
        path.rename(grave)
    except FileNotFoundError:
        return
    if _read(grave) != holder:
        os.link(grave, path)
    grave.unlink()


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the holder's process lives; its start time tells it from a later process of the same number."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(pid) == holder.get("started")


def _start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since the boot that is named too; None if it is dead or cannot be told."""
    try:
        # proc(5): field 3 is the state, field 22 the start; they follow the command's name, which ends at the last ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _held(path: Path, holder: dict[str, Any] | None) -> CheckpointError:
    holder = holder or {}
    return CheckpointError(
        "CKPT-034",
        f"Another job writes into {path.parent}: process {holder.get('pid')} on {holder.get('host')} holds its lock.",
        f"Give this job its own folder; if that job is gone for good, delete {path}.",
    )
