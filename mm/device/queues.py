"""Queues of device work, for copies between device and host memory that run beside the computation.

Three queues: `compute`, which is the device's current stream, and one for the copies in each direction. A queue works
in order; between queues an event says what must have happened before. The process itself waits for nothing. On the CPU
there is nothing to run beside: copies happen at once and in the order in which they are asked for.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mm.device.backend import Backend, DeviceKind

Queue = Literal["compute", "to host", "to device"]

ALIGNMENT = 256
"""Bytes; every tensor that shares memory which is copied as a whole begins at a multiple."""


@dataclass(frozen=True)
class TransferEvent:
    """One entry of a timeline: what the process told the queues to do, in order.

    Attributes:
        action: `to host` and `to device` start a layer's copy; `released` lets its device memory go; `needed` is the
            computation asking for it.
        number: of the pass. layer: in the pass.
    """

    action: str
    number: int
    layer: int


def aligned_bytes(elements: int, itemsize: int) -> int:
    """Bytes that a tensor takes in such memory."""
    return math.ceil(elements * itemsize / ALIGNMENT) * ALIGNMENT


class Queues(Protocol):
    """Operations that copies beside the computation need of a device."""

    def record(self, queue: Queue) -> Any:
        """An event: everything that the queue has been given until now."""

    def wait(self, queue: Queue, event: Any) -> None:
        """Hold back all work that the queue is given from now on until the event."""

    def copy(self, queue: Queue, target: Tensor, source: Tensor) -> None:
        """Give a queue the copy of a tensor into another one; both live until an event behind it has happened."""

    def finish(self, event: Any) -> None:
        """Hold back the process until the event; for threads that only read files."""

    def host_memory(self, num_bytes: int) -> Tensor:
        """Host memory as uint8 [num_bytes] that the device copies from and to without the process."""

    def device_memory(self, num_bytes: int) -> Tensor:
        """Device memory as uint8 [num_bytes] that `to device` writes and `compute` reads, for as long as it lives."""


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

    def finish(self, event: Any) -> None:
        """Nothing is pending."""
        del event

    def host_memory(self, num_bytes: int) -> Tensor:
        """Plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def device_memory(self, num_bytes: int) -> Tensor:
        """Plain memory."""
        return torch.empty(num_bytes, dtype=torch.uint8)


class DeviceQueues:
    """`Queues` of an accelerator: its current stream and two of its own."""

    def __init__(self, backend: Backend) -> None:
        self._module = getattr(torch, backend.kind)
        self._kind, self._device = backend.kind, backend.device
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

    def finish(self, event: Any) -> None:
        """The process waits."""
        event.synchronize()

    def host_memory(self, num_bytes: int) -> Tensor:
        """Page-locked memory."""
        return page_locked(self._kind, num_bytes)

    def device_memory(self, num_bytes: int) -> Tensor:
        """Memory that torch gives to nobody else before the copies into it are over."""
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._streams["to device"])
        return memory

    def _stream(self, queue: Queue) -> Any:
        return self._module.current_stream() if queue == "compute" else self._streams[queue]


def page_locked(kind: DeviceKind, num_bytes: int) -> Tensor:
    """Host memory as uint8 [num_bytes] that an accelerator of this kind copies from and to by itself."""
    if num_bytes == 0:  # CUDA refuses to lock nothing
        return torch.empty(0, dtype=torch.uint8)
    if kind != "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    # Torch's allocator of pinned memory rounds up to a power of two, which may be twice what is needed.
    memory = np.empty(num_bytes, dtype=np.uint8)
    address = memory.ctypes.data
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
    # The address may be given to others, who lock it again; so it is unlocked before it is freed.
    weakref.finalize(memory, _unlock, address).atexit = False
    return torch.from_numpy(memory)


def _unlock(address: int) -> None:
    torch.cuda.synchronize()  # copies from and to it
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def queues_of(backend: Backend) -> Queues:
    """The queues of a process's device."""
    return HostQueues() if backend.kind == "cpu" else DeviceQueues(backend)
