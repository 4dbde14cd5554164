"""Claims on shards: files that say who works on which, so that workers share a store and wait for nobody.

A claim is a file that only one process can make, where the file system knows hard links. Its owner touches it every ten
seconds; one that was not touched for five minutes, or whose process this machine knows to be gone, is taken over. Times
are those that the file server gives to files, so that clocks of machines may differ. Two workers may still come to work
on one shard, where one was stopped for minutes and goes on. Both make the same bytes, and the first to rename its
folder has made the shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import psutil

from mm.data.files import TEMPORARY_PREFIX, make_folder, write_error
from mm.errors import DataError

HEARTBEAT_S = 10.0
LEASE_S = 300.0  # file systems of a network may show a file's time a minute late
CLAIMS = "claims"
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that works: a word that it alone has, its machine, its place there, and when it began there."""

    token: str
    host: str
    machine: str
    pid: int
    began: float

    @classmethod
    def this_process(cls) -> Owner:
        """The calling process."""
        pid = os.getpid()
        return cls(uuid4().hex, socket.gethostname(), _machine(), pid, psutil.Process(pid).create_time())

    def is_gone(self) -> bool:
        """Tell whether it ran on this machine and does so no more."""
        if self.machine != _machine():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.began) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim that is there: what it is on, by whom, since when and when it was last touched, by the server's clock.

    The owner is None where the file cannot be read.
    """

    name: str
    owner: Owner | None
    since: float
    touched: float

    def is_stale(self, now: float) -> bool:
        """Tell whether its owner works no more, as far as can be told."""
        return now - self.touched > LEASE_S or (self.owner is not None and self.owner.is_gone())


class Claims:
    """The claims of this process in a folder. Use it as a context manager: leaving it gives all of them back."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: of all claims on one store; it is made.

        Raises:
            DataError: DATA-018.
        """
        make_folder(folder, "the store's folder")
        self.owner = Owner.this_process()
        self._folder = folder
        self._clock = folder / f"{TEMPORARY_PREFIX}clock-{self.owner.token}"
        self._held: set[str] = set()
        self._lost: set[str] = set()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_touching, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        for name in list(self._held):
            self.give_back(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Claim something, if nobody has it, this process among them, or who had it is gone.

        Raises:
            DataError: DATA-018, DATA-019 when the claim cannot be written.
        """
        if name in self._held:
            return False
        if self._make(name):
            return True
        found = read_claim(self._folder / name)
        if found is None:
            return self._make(name)
        if not found.is_stale(self.now()):
            return False
        return self._remove(found) and self._make(name)

    @contextmanager
    def waiting_for(self, name: str, timeout_s: float) -> Iterator[None]:
        """Hold a claim that others give back soon.

        Raises:
            DataError: DATA-191 when that takes too long.
        """
        until = time.monotonic() + timeout_s
        while not self.take(name):
            if time.monotonic() > until:
                held = read_claim(self._folder / name)
                by = held.owner if held is not None else None
                who = "another process" if by is None else f"process {by.pid} of {by.host}"
                found = f"{who} has held {self._folder / name} for {timeout_s / 60:g} minutes"
                raise DataError("DATA-191", f"{found}.", "See what it does, and start again when it is done or ended.")
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            self.give_back(name)

    def give_back(self, name: str) -> None:
        """Remove a claim of this process."""
        with self._lock:
            self._held.discard(name)
            if name in self._lost or not self._is_mine(name):
                return
            (self._folder / name).unlink(missing_ok=True)

    def is_lost(self, name: str) -> bool:
        """Tell whether somebody else took a claim of this process over."""
        return name in self._lost or not self._is_mine(name)

    def now(self) -> float:
        """The time of the file server, in its seconds."""
        try:
            self._clock.touch()
            return self._clock.stat().st_mtime
        except OSError:
            return time.time()

    def _make(self, name: str) -> bool:
        """Make a claim, whole at once: a file that says who has it gets a second name, which must be new."""
        path, written = self._folder / name, self._folder / f"{TEMPORARY_PREFIX}{name}-{self.owner.token}"
        try:
            with open(written, "wb") as file:
                since = os.fstat(file.fileno()).st_mtime
                file.write(json.dumps({**asdict(self.owner), "since": since}).encode())
            with self._lock:
                self._held.add(name)  # before it is: whatever ends this process finds it among its own
                self._lost.discard(name)
            os.link(written, path)
            return True
        except (FileExistsError, FileNotFoundError):  # without its folder the store is finished
            self._held.discard(name)
            return False
        except OSError as error:
            self._held.discard(name)
            raise write_error(path, 0, error) from error
        finally:
            written.unlink(missing_ok=True)

    def _remove(self, stale: Claim) -> bool:
        """Remove a claim of somebody who is gone; False where another process was faster."""
        path = self._folder / stale.name
        aside = self._folder / f"{TEMPORARY_PREFIX}{stale.name}-{uuid4().hex[:12]}"
        try:
            os.rename(path, aside)
        except OSError:
            return False
        removed = read_claim(aside)
        if removed is not None and removed.owner != stale.owner:  # another process took it over just now: put it back
            with contextlib.suppress(OSError):
                os.link(aside, path)
            aside.unlink(missing_ok=True)
            return False
        aside.unlink(missing_ok=True)
        return True

    def _is_mine(self, name: str) -> bool:
        found = read_claim(self._folder / name)
        return found is not None and found.owner == self.owner

    def _keep_touching(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            for name in list(self._held):
                with self._lock:
                    if name not in self._held:
                        continue
                    if not self._is_mine(name):
                        self._lost.add(name)
                        continue
                    with contextlib.suppress(OSError):
                        os.utime(self._folder / name)


def read_claim(path: Path) -> Claim | None:
    """A claim; None where there is none."""
    try:
        touched = path.stat().st_mtime
        content = path.read_bytes()
    except OSError:
        return None
    try:
        values = json.loads(content)
        since = float(values.pop("since"))
        return Claim(path.name, Owner(**values), since, touched)
    except (ValueError, KeyError, TypeError):
        return Claim(path.name, None, touched, touched)


def all_claims(folder: Path) -> list[Claim]:
    """All claims of a folder."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [read_claim(folder / name) for name in names if not name.startswith(TEMPORARY_PREFIX)]
    return [claim for claim in found if claim is not None]


def _machine() -> str:
    """Word for what process numbers are unique in: a machine since it was started, and a namespace of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
