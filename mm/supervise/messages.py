"""Messages of a job's processes in its key-value store, signed, since whoever reaches the store can write there.

A message is `MAC JSON`: the JSON holds a number that its sender raises and the value; the MAC (HMAC-SHA256) is over the
store's prefix, the key and the JSON, so that none can be made, changed, moved to another key or another start, or put
back after a later one, by someone without the secret. What does not verify is counted, logged, and as good as absent.
Nothing is ever unpickled. Counters of the store cannot be signed: what hangs on them alone may be disturbed.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import itertools
import json
import logging
import time
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

_UNSIGNED = "-" * 64
_POLL_S = 0.1
_ABSENT = object()


class Messages:
    """One process's messages in one store. Threads must not share it without a lock of their own.

    Attributes:
        forged: messages that were not of this job, so far.
    """

    def __init__(self, store: Store, secret: bytes | None = None, context: str = "") -> None:
        """Write and read in `store`.

        Args:
            store: of the job, perhaps with a prefix.
            secret: of the job; without it messages are not signed, and everybody's are read.
            context: what the same keys are told apart by: the store's prefix.
        """
        self._store, self._secret, self._context = store, secret, context
        self._sent = itertools.count(1)
        self._newest: dict[str, tuple[int, Any]] = {}
        self._refused: dict[str, bytes] = {}
        self.forged = 0

    def write(self, name: str, value: Any) -> None:
        """Put a value (JSON) under a name that only this process uses, over what it told before."""
        self._store.set(name, self._sealed(name, next(self._sent), value))

    def claim(self, name: str, value: Any) -> bool:
        """Put a value under a name, unless that was done before; whether this call was the first of the job."""
        mine = self._sealed(name, 0, value, uuid4().hex)
        found = self._store.compare_set(name, "", mine)
        if found == mine.encode():
            return True
        if self._opened(name, found) is not _ABSENT:
            return False
        self._store.set(name, mine)  # over what nobody of this job has written
        return True

    def read(self, name: str) -> Any | None:
        """Message under a name, or None; does not wait."""
        if not self._store.check([name]):
            return None
        found = self._opened(name, self._store.get(name))
        return None if found is _ABSENT else found

    def wait(self, name: str, timeout: datetime.timedelta) -> Any:
        """Message under a name, as soon as there is one.

        Raises:
            DistStoreError: it was not within the time.
        """
        until = time.monotonic() + timeout.total_seconds()
        while True:
            self._store.wait([name], datetime.timedelta(seconds=max(0.001, until - time.monotonic())))
            found = self._opened(name, self._store.get(name))
            if found is not _ABSENT:
                return found
            if time.monotonic() > until:
                raise dist.DistStoreError(f"only a forged message under {name}")
            time.sleep(_POLL_S)

    def append(self, name: str, value: Any) -> None:
        """Add a value to a roll that several processes write."""
        self._store.append(name, f"{self._sealed(name, 0, value)}\n")  # type: ignore[attr-defined]  # missing from stubs

    def roll(self, name: str) -> list[Any]:
        """The values of a roll, each once."""
        lines = dict.fromkeys(self._store.get(name).splitlines()) if self._store.check([name]) else {}
        found = [self._opened(name, line) for line in lines]
        return [value for value in found if value is not _ABSENT]

    def count(self, name: str, amount: int) -> int:
        """Add to a counter and return it; it is not signed."""
        return int(self._store.add(name, amount))

    def _sealed(self, name: str, number: int, value: Any, nonce: str = "") -> str:
        body = json.dumps([number, nonce, value])
        return f"{self._mac(name, body.encode())} {body}"

    def _mac(self, name: str, body: bytes) -> str:
        if self._secret is None:
            return _UNSIGNED
        text = json.dumps([self._context, name]).encode() + body
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()

    def _opened(self, name: str, message: bytes) -> Any:
        """The value of a message, the newest known one where an older was put back, or `_ABSENT`."""
        mac, _, body = message.partition(b" ")
        if self._secret is not None and not hmac.compare_digest(mac, self._mac(name, body).encode()):
            return self._refuse(name, message)
        try:
            number, _, value = json.loads(body)
        except (ValueError, TypeError, RecursionError):
            return self._refuse(name, message)
        newest, known = self._newest.get(name, (0, None))
        if number and number < newest:
            self._refuse(name, message)
            return known
        if number:
            self._newest[name] = number, value
        return value

    def _refuse(self, name: str, message: bytes) -> Any:
        if self._refused.get(name) != message:
            self._refused[name] = message
            self.forged += 1
            logger.warning(
                'A message "%s" in the job\'s store is not of this job and is ignored (%d so far): a node of it '
                "has another MM_JOB_SECRET, or somebody else reaches MASTER_PORT. docs/cluster.md says which ports to "
                "close.",
                name,
                self.forged,
            )
        return _ABSENT
