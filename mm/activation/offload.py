"""Offload: tensors that recomputed blocks keep wait for backward in host memory.

A pass is one forward of a stage on one micro-batch, and its backward. In forward every layer but the last gets a slot
of a fixed pool of page-locked host memory; its tensors are copied there while the device computes on, and are let go
of when the layer after it is done. In backward, when a layer begins, the tensors of the one before it are called back,
so they arrive while it computes. Each pass owns its slots, so that any number of micro-batches may be under way.

Nothing waits on the host: an event before a queue's next work is the only tie (`mm.device.queues`). Device memory that
a copy reads is released only after the compute queue was told to wait for it, because its next user is that queue.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm.device.queues import Queues, TransferEvent, aligned_bytes


class Offloader:
    """The pool and the queues; hands out passes. `fewest_free` counts the slots that were never used at once.

    Args:
        queues: of the device.
        num_slots: layers that wait in host memory at the same time, at most.
        slot_bytes: of a layer, at most (`aligned_bytes`).
        timeline: if given, what is told to the queues is appended to it.
    """

    def __init__(
        self, queues: Queues, num_slots: int, slot_bytes: int, timeline: list[TransferEvent] | None = None
    ) -> None:
        self.queues = queues
        self.memory = queues.host_memory(num_slots * slot_bytes)
        self._slots = list(self.memory.split(slot_bytes)) if num_slots else []
        self._timeline = timeline
        self._passes = 0
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self.fewest_free = num_slots

    def begin(self, num_layers: int) -> OffloadPass:
        """A pass of that many layers, the last of which stays on the device because backward begins with it."""
        self._passes += 1
        return OffloadPass(self, self._passes - 1, num_layers)

    def take_slot(self) -> Tensor:
        """A slot that nobody uses."""
        if not self._slots:
            raise AssertionError("more layers wait in host memory than the pool was made for")
        slot = self._slots.pop()
        self.fewest_free = min(self.fewest_free, len(self._slots))
        return slot

    def give_slot(self, slot: Tensor) -> None:
        """The compute queue has been told to wait for the slot's copies back; the next copy into it waits for that."""
        self._slots.append(slot)

    def note(self, action: str, number: int, layer: int) -> None:
        """Add to the timeline."""
        if self._timeline is not None:
            self._timeline.append(TransferEvent(action, number, layer))


class OffloadPass:
    """The layers of one forward and its backward."""

    def __init__(self, offloader: Offloader, number: int, num_layers: int) -> None:
        self._offloader = offloader
        self._number = number
        self._layers = [_Layer(index < num_layers - 1) for index in range(num_layers)]

    def put(self, layer: int, tensor: Tensor) -> int:
        """Keep a tensor of a layer; returns what `take` gives it back for."""
        kept, offloader = self._layers[layer], self._offloader
        kept.on_device.append(tensor)
        if kept.leaves:
            if kept.slot is None:
                kept.slot = offloader.take_slot()
                offloader.note("to host", self._number, layer)
            place = kept.place(tensor)
            kept.on_host.append(place)
            offloader.queues.wait("to host", offloader.queues.record("compute"))
            offloader.queues.copy("to host", place, tensor)
        return len(kept.on_device) - 1

    def done(self, layer: int) -> None:
        """The forward of a layer has run, and the copy of the one before it had that long: it leaves the device."""
        kept = self._layers[layer]
        if kept.leaves:
            kept.copied = self._offloader.queues.record("to host")
        if layer > 0:
            self._release(layer - 1)

    def take(self, layer: int, index: int) -> Tensor:
        """Give back, once, what was put; the layer before it starts to come back."""
        kept = self._layers[layer]
        if not kept.asked:
            kept.asked = True
            self._offloader.note("needed", self._number, layer)
            self._call_back(layer)  # no layer after it has done so when backward begins here
            if kept.slot is not None:
                self._offloader.queues.wait("compute", kept.copied)
                self._offloader.give_slot(kept.slot)
                kept.slot = None
            if layer > 0:
                self._call_back(layer - 1)
        tensor = kept.on_device[index]
        if tensor is None:
            raise RuntimeError("what a recomputed block keeps can be used by one backward only")
        kept.on_device[index] = None
        return tensor

    def _release(self, layer: int) -> None:
        kept, offloader = self._layers[layer], self._offloader
        if kept.leaves and not kept.released:
            kept.released = True
            offloader.queues.wait("compute", kept.copied)
            kept.on_device = [None] * len(kept.on_device)
            offloader.note("released", self._number, layer)

    def _call_back(self, layer: int) -> None:
        kept, offloader = self._layers[layer], self._offloader
        if not kept.leaves or kept.returning:
            return
        kept.returning = True
        self._release(layer)
        offloader.note("to device", self._number, layer)
        kept.on_device = [torch.empty_like(place, device=kept.device) for place in kept.on_host]
        # The new memory may be what the compute queue has just let go of and still reads. That queue has also waited
        # for the copies to host memory, when the layer was released.
        offloader.queues.wait("to device", offloader.queues.record("compute"))
        for target, place in zip(kept.on_device, kept.on_host, strict=True):
            offloader.queues.copy("to device", target, place)  # type: ignore[arg-type]
        kept.copied = offloader.queues.record("to device")


@dataclass
class _Layer:
    """Tensors that a layer keeps, with their places on device and host.

    Attributes:
        leaves: whether it goes to host memory.
        on_device: its tensors; None for those that were let go of or given back.
        on_host: their places in the slot. used: bytes of the slot.
        copied: event after which the latest copy, in either direction, has happened.
        released: whether the device has let go of them. returning: whether they were called back.
        asked: whether backward has begun with this layer.
        device: of the tensors.
    """

    leaves: bool
    on_device: list[Tensor | None] = field(default_factory=list)
    on_host: list[Tensor] = field(default_factory=list)
    slot: Tensor | None = None
    used: int = 0
    copied: Any = None
    released: bool = False
    returning: bool = False
    asked: bool = False
    device: torch.device | None = None

    def place(self, tensor: Tensor) -> Tensor:
        """The next free part of the slot, shaped and strided like the tensor."""
        if self.slot is None:
            raise AssertionError("a layer without a slot")
        self.device = tensor.device
        size = tensor.numel() * tensor.itemsize
        part = self.slot[self.used : self.used + size]
        if len(part) != size:
            raise AssertionError(f"a layer keeps more than the {len(self.slot)} bytes of its slot")
        self.used += aligned_bytes(tensor.numel(), tensor.itemsize)
        # In the tensor's own order of memory, so that the copy is one piece.
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
        if not tensor.permute(order).is_contiguous():
            order = list(range(tensor.ndim))
        sizes = [tensor.shape[dim] for dim in order]
        return part.view(tensor.dtype).view(sizes).permute([order.index(dim) for dim in range(tensor.ndim)])
