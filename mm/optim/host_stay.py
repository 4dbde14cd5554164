"""A model and its optimizer that wait in host memory while others use the device.

What moves is the memory behind the tensors, not the tensors: views of it, such as megatron-core's buffers, masters
that are parameters, FSDP2's shards and the optimizer's slices, stay what they are. Gradients, which the next forward
and backward make anew, only give their memory back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from mm.device.queues import queues_of
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel
from mm.parallel.placement import local


class HostStay:
    """Memory of one model and its optimizer, on the device or on the host.

    Attributes:
        here: whether it is on the device. moved_bytes: copied between device and host until now.
    """

    def __init__(self, parallel: ParallelModel, optimizer: Optimizer) -> None:
        """Both are on the device, and may leave between steps."""
        self._parallel, self._optimizer = parallel, optimizer
        self._host_memory = queues_of(parallel.backend).host_memory
        self._copies: list[tuple[UntypedStorage, Tensor]] = []
        self._gradients: list[tuple[UntypedStorage, int]] = []
        self.here, self.moved_bytes = True, 0

    @property
    def host_bytes(self) -> int:
        """Host memory that is held for the copies."""
        return sum(copy.nbytes for _, copy in self._copies)

    @torch.no_grad()
    def leave(self) -> None:
        """Copy everything to the host and give the device's memory back."""
        if not self.here:
            return
        kept = list(self._storages(self._kept(), set()))
        known = {storage._cdata: copy for storage, copy in self._copies}
        self._copies = [(storage, self._copy_of(storage, known)) for storage in kept]
        for storage, copy in self._copies:
            copy.copy_(self._bytes_of(storage), non_blocking=True)
            self.moved_bytes += copy.nbytes
        self._parallel.backend.synchronize()
        gradients = self._storages(self._made_anew(), {storage._cdata for storage in kept})
        self._gradients = [(gradient, gradient.nbytes()) for gradient in gradients]
        for storage in [*kept, *(one for one, _ in self._gradients)]:
            storage.resize_(0)
        self.here = False

    @torch.no_grad()
    def enter(self) -> None:
        """Take memory of the device and copy everything back."""
        if self.here:
            return
        for gradient, size in self._gradients:
            gradient.resize_(size)
        for storage, copy in self._copies:
            storage.resize_(copy.nbytes)
            self._bytes_of(storage).copy_(copy, non_blocking=True)
            self.moved_bytes += copy.nbytes
        self._parallel.backend.synchronize()  # the host's memory is written to when it leaves again
        self.here = True

    def _copy_of(self, storage: UntypedStorage, known: dict[int, Tensor]) -> Tensor:
        """Memory of the last stay where that is as large."""
        copy = known.get(storage._cdata)
        return copy if copy is not None and copy.nbytes == storage.nbytes() else self._host_memory(storage.nbytes())

    def _bytes_of(self, storage: UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._parallel.backend.device).set_(storage)

    def _storages(self, tensors: Iterator[Tensor], counted: set[int]) -> Iterator[UntypedStorage]:
        """The memory of the device behind tensors, each piece once."""
        for tensor in map(local, tensors):
            storage = tensor.untyped_storage()
            on_device = tensor.device.type == self._parallel.backend.device.type  # counts of steps may be elsewhere
            if on_device and storage.nbytes() and storage._cdata not in counted:
                counted.add(storage._cdata)
                yield storage

    def _kept(self) -> Iterator[Tensor]:
        yield from self._parallel.all_parameters().values()
        for stage in self._parallel.stages:
            yield from stage.model.buffers()
        for chunk in self._parallel.chunks:
            yield from (data for buffer in _buffers(chunk) if (data := buffer.param_data) is not None)
        for shard in self._optimizer.shards:
            yield shard.master
            yield from (value for value in shard.inner.state.get(shard.key, {}).values() if isinstance(value, Tensor))
        if self._optimizer.average is not None:
            yield from self._optimizer.average.values.values()

    def _made_anew(self) -> Iterator[Tensor]:
        for chunk in self._parallel.chunks:
            yield from (buffer.grad_data for buffer in _buffers(chunk))


def _buffers(chunk: object) -> list[Any]:
    """megatron-core's buffers of a chunk; layer-zero has none."""
    return list(getattr(chunk, "buffers", ())) if hasattr(chunk, "zero_grad_buffer") else []
