"""Queues of device work, for copies between device and host memory that run beside the computation.

Three queues: `compute`, which is the device's current stream, and one for the copies in each direction. A queue works
in order; between queues an event says what must have happened before. The process itself waits for nothing. On the CPU
there is nothing to run beside: copies happen at once and in the order in which they are asked for.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mm.device.backend import Backend, DeviceKind

Queue = Literal["compute", "to host", "to device"]


class Queues(Protocol):
    """Operations that copies beside the computation need of a device."""

    def record(self, queue: Queue) -> Any:
        """An event: everything that the queue has been given until now."""

    def wait(self, queue: Queue, event: Any) -> None:
        """Hold back all work that the queue is given from now on until the event."""

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """Give a queue the copy of a tensor into another one; both live until an event behind it has happened."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Host memory as uint8 [num_bytes] that the device copies from and to without the process."""


class HostQueues:
    """`Queues` of the CPU."""

    def record(self, queue: Queue) -> Any:
        """Nothing is ever pending."""
        del queue

    def wait(self, queue: Queue, event: Any) -> None:
        """Nothing to wait for."""
        del queue, event

    @torch.no_grad()
    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """Copy."""
        del queue
        target.copy_(source)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)


class DeviceQueues:
    """`Queues` of an accelerator: its current stream and two of its own."""

    def __init__(self, backend: Backend) -> None:
        self._module = getattr(torch, backend.kind)
        self._kind = backend.kind
        self._streams = {name: self._module.Stream(backend.device) for name in ("to host", "to device")}

    def record(self, queue: Queue) -> Any:
        """A device event."""
        return self._stream(queue).record_event()

    def wait(self, queue: Queue, event: Any) -> None:
        """The stream waits."""
        self._stream(queue).wait_event(event)

    @torch.no_grad()
    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """An asynchronous copy."""
        with self._module.stream(self._stream(queue)):
            target.copy_(source, non_blocking=True)

    def host_memory(self, num_bytes: int) -> Tensor:
        """Page-locked memory."""
        return page_locked(self._kind, num_bytes)

    def _stream(self, queue: Queue) -> Any:
        return self._module.current_stream() if queue == "compute" else self._streams[queue]


def page_locked(kind: DeviceKind, num_bytes: int) -> Tensor:
    """Host memory as uint8 [num_bytes] that an accelerator of this kind copies from and to by itself."""
    if num_bytes == 0:  # CUDA refuses to lock nothing
        return torch.empty(0, dtype=torch.uint8)
    if kind != "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    # Torch's allocator of pinned memory rounds up to a power of two, which may be twice what is needed.
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0))
    return memory


def queues_of(backend: Backend) -> Queues:
    """The queues of a process's device."""
    return HostQueues() if backend.kind == "cpu" else DeviceQueues(backend)
