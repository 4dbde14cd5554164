"""Queues that put every copy off as long as the events between them allow."""

import math
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from mm.device.queues import HostQueues, Queue


class LateQueues(HostQueues):
    """Copies run when an event behind them is waited for by the computation, and not before.

    Args:
        deaf: a queue that does not wait for events of the other; None does everything right.
    """

    def __init__(self, deaf: tuple[Queue, Queue] | None = None) -> None:
        self._deaf = deaf
        self._pending: dict[Queue, list[Any]] = {"compute": [], "to host": [], "to device": []}
        self._begun: Counter[Queue] = Counter()

    def host_memory(self, num_bytes: int) -> Tensor:
        return super().host_memory(num_bytes).fill_(0xFF)  # NaN: what an earlier pool left there could be right

    def device_memory(self, num_bytes: int) -> Tensor:
        return super().device_memory(num_bytes).fill_(0xFF)

    def record(self, queue: Queue) -> Any:
        return queue, self._begun[queue] + len(self._pending[queue])

    def wait(self, queue: Queue, event: Any) -> None:
        if self._deaf == (queue, event[0]):
            return
        if queue == "compute":
            self._run(*event)
        else:
            self._pending[queue].append(event)

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        if queue == "to device":
            target.fill_(math.nan if target.is_floating_point() else 0xFF)
            self._pending[queue].append((target, lambda: source))
        else:
            self._pending[queue].append((target, weakref.ref(source)))  # it must live by what the offloader holds

    @torch.no_grad()
    def _run(self, queue: Queue, until: int) -> None:
        while self._begun[queue] < until and self._pending[queue]:
            first, second = self._pending[queue].pop(0)
            self._begun[queue] += 1
            if isinstance(first, str):
                self._run(first, second)
                continue
            source = second()
            if source is None:
                raise RuntimeError("device memory was let go of before its copy")
            first.copy_(source)
