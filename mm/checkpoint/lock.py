"""One job at a time writes into a checkpoint folder: a lock that dies with its owner, and a heartbeat beside it.

`.lock` says who holds the folder: a random name, host, process, the kernel's boot id, and a count that its owner raises
every few seconds. The owner also holds an exclusive `flock` on that file, which the kernel gives back when the process
ends. Who finds the file judges from that, since host names and process numbers identify nobody across containers:

- the `flock` is held: the owner lives, whatever it is called (or is stopped, which is no death);
- the `flock` is free, and the owner wrote the boot id of this kernel: it is dead, the lock is taken over at once;
- else (another node, or a file system without `flock`) the heartbeat is watched by this observer's own clock. Where it
  stands still for `Times.stale_s` the lock is taken over; clocks of nodes are never compared.

An owner that slept through its own end finds another name in the file, before it commits anything (`Lock.require`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from mm.errors import CheckpointError

log = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF)
"""What file systems answer that have no such locks."""


@dataclass(frozen=True)
class Times:
    """Times by which a lock is kept and judged.

    Attributes:
        beat_s: seconds between heartbeats. stale_s: seconds without one after which a lock is taken over.
        flock: use the kernel's locks; without, the heartbeat alone decides.
    """

    beat_s: float = 5.0
    stale_s: float = 60.0
    flock: bool = True


DEFAULT_TIMES = Times()


class Lock:
    """A lock that is held; made by `locked`."""

    def __init__(self, path: Path, times: Times) -> None:
        """Take the lock `path`, which must not exist.

        Raises:
            FileExistsError: it does. OSError: the folder cannot be written.
        """
        self._path, self._times = path, times
        self._owner = {
            "id": uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),  # read by earlier versions
            "boot": _boot_id(),
        }
        # A link gives the lock its name and its content in one step: no one can read it half-written.
        draft = path.with_name(f".tmp-lock-{uuid4().hex[:12]}")
        self._file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        try:
            self._owner["flock"] = times.flock and _try_flock(self._file) is True
            self._write(0)
            os.link(draft, path)
        except BaseException:
            os.close(self._file)
            raise
        finally:
            draft.unlink()
        self._beaten = _clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def require(self, *, look: bool = False) -> None:
        """Return while this process holds the lock.

        Args:
            look: read the file in any case, not only when the last heartbeat is old enough for another job to act.

        Raises:
            CheckpointError: CKPT-100 when another job has taken it over. OSError: it cannot be read.
        """
        if not look and _clock() - self._beaten < self._times.stale_s / 2:
            return
        holder = _read(self._path)
        if holder.get("id") == self._owner["id"]:
            return
        who = f"{_name(holder)} has taken over the lock" if holder else "the lock is gone"
        raise CheckpointError(
            "CKPT-100",
            f"This job does not hold {self._path.parent} any more: {who} after it stood still.",
            "Let the other job go on; nothing more was written here. Look why this process or its disk stood still.",
        )

    def release(self) -> None:
        """Give the lock back, unless another job has it."""
        self._over.set()
        self._thread.join(self._times.beat_s)
        try:
            if _read(self._path).get("id") == self._owner["id"]:
                self._path.unlink(missing_ok=True)
        finally:
            if not self._thread.is_alive():  # else a disk holds it, and it may write once more
                os.close(self._file)

    def _beat(self) -> None:
        count, failing = 0, False
        while not self._over.wait(self._times.beat_s):
            count += 1
            try:
                self._write(count)
                self.require(look=True)
                self._beaten, failing = _clock(), False
            except CheckpointError:  # `require` says so where it can be acted upon
                self._beaten = -math.inf
                return
            except OSError as error:
                if not failing:
                    log.warning("The lock %s cannot be renewed: %s", self._path, error)
                failing = True

    def _write(self, count: int) -> None:
        """One write of always the same length, in place: the name stays, and with it the kernel's lock."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.pwrite(self._file, json.dumps({**self._owner, "beat": f"{count:012}", "time": now}).encode(), 0)
        os.fsync(self._file)


@contextmanager
def locked(folder: Path, times: Times = DEFAULT_TIMES) -> Iterator[Lock]:
    """Hold `folder/.lock` while inside; a dead owner's is taken over, see above.

    Raises:
        CheckpointError: CKPT-034 when another job holds it.
        OSError: the folder cannot be written.
    """
    lock = _acquire(folder / LOCK_NAME, times)
    try:
        yield lock
    finally:
        lock.release()


def holder_of(folder: Path) -> str | None:
    """Holder of a folder's lock, as far as can be told at once; None where it is free or its owner is dead."""
    path = folder / LOCK_NAME
    try:
        with _opened(path, DEFAULT_TIMES) as (file, free):
            holder = _content(file)
            return None if _is_dead(holder, free) else _name(holder)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _acquire(path: Path, times: Times) -> Lock:
    for _ in range(3):  # of jobs that start together some find the lock of the first
        try:
            return Lock(path, times)
        except FileExistsError:
            with suppress(FileNotFoundError):
                _remove_if_stale(path, times)
    raise _held(path, _read(path))


def _remove_if_stale(path: Path, times: Times) -> None:
    """Delete the lock of a dead owner.

    Raises:
        CheckpointError: CKPT-034 when it lives. FileNotFoundError: it has just ended.
    """
    with _opened(path, times) as (file, free):
        holder = _content(file)
        may_be_dead = free is not False and "id" in holder
        if not (_is_dead(holder, free) or (may_be_dead and _stands_still(path, holder, times))):
            raise _held(path, holder)
        log.warning("%s held the lock %s and is dead: taking it over.", _name(holder), path)
        # Renamed before it is deleted: of two that found it stale one fails here, and neither deletes a new lock.
        grave = path.with_name(f".tmp-lock-{uuid4().hex[:12]}")
        path.rename(grave)
        if grave.stat().st_ino != os.fstat(file).st_ino:
            with suppress(FileExistsError):
                os.link(grave, path)
        grave.unlink()


@contextmanager
def _opened(path: Path, times: Times) -> Iterator[tuple[int, bool | None]]:
    """A lock file, and whether its `flock` was free (and is held now); None where that says nothing."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # network file systems lock what may be written
    except PermissionError:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file, _try_flock(file) if times.flock else None
    finally:
        os.close(file)


def _try_flock(file: int) -> bool | None:
    """Ask the kernel for the lock of a file: whether it is this process's; None for file systems without such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _is_dead(holder: dict[str, Any], free: bool | None) -> bool:
    """Tell an owner that is known to be dead without watching it."""
    if "id" in holder:
        return free is True and holder.get("flock") is True and holder.get("boot") == _boot_id() is not None
    # A lock of an earlier version: no heartbeat, no flock. As that version did, its process is looked for on its host.
    return holder.get("host") == socket.gethostname() and not _is_alive(holder)


def _stands_still(path: Path, holder: dict[str, Any], times: Times) -> bool:
    """Watch a heartbeat; whether it has not changed for the time after which its owner counts as dead."""
    log.warning(
        "%s holds the lock %s. It is on another node, or its end cannot be seen from here: watching its heartbeat for "
        "%g s; if it stands still the lock is taken over.",
        _name(holder),
        path,
        times.stale_s,
    )
    seen, until = path.read_bytes(), _clock() + times.stale_s
    while (left := until - _clock()) > 0:
        time.sleep(min(times.beat_s, left))
        if path.read_bytes() != seen:
            return False
    return True


def _is_alive(holder: dict[str, Any]) -> bool:
    """Look for the process of an earlier version's lock; its start time tells it from a later one of its number."""
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
    """Start of a process, in clock ticks since the boot that is named too; None if it is dead or cannot be told."""
    try:
        # proc(5): field 3 is the state, field 22 the start; they follow the command's name, which ends at the last ")".
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{_boot_id()}/{fields[19]}"


def _boot_id() -> str | None:
    """The running kernel's random name, the same in all its containers; None where it cannot be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _clock() -> float:
    """Seconds, also of the time that the machine was suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _read(path: Path) -> dict[str, Any]:
    """The content of a lock; empty where there is none or it makes no sense."""
    try:
        return _parsed(path.read_bytes())
    except FileNotFoundError:
        return {}


def _content(file: int) -> dict[str, Any]:
    return _parsed(os.pread(file, 4096, 0))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _held(path: Path, holder: dict[str, Any]) -> CheckpointError:
    remedy = "Give this job its own folder, or end that one; the lock of a job that is dead is taken over by itself."
    if "id" not in holder:
        remedy = (
            f"Give this job its own folder; that lock has no heartbeat: if its job is gone for good, delete {path}."
        )
    return CheckpointError(
        "CKPT-034", f"Another job writes into {path.parent}: {_name(holder)} holds its lock.", remedy
    )
