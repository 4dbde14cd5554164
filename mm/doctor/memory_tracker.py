"""Memory by kind, tracked at every tensor storage: on a real device and with fake tensors alike.

Torch's dispatcher shows every operator's results. A storage seen for the first time was just allocated, and a weak
reference tells when it is freed. That makes a log of sizes; what was alive at the peak is computed from it afterwards,
so that a storage may get its kind at any time: a gradient is known to be one only when backward has put it there.

What operators allocate and free inside (workspaces) is not seen, nor is what an allocator loses to fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm.doctor.traffic import is_collective
from mm.parallel.placement import local

PARAMETERS, GRADIENTS, OPTIMIZER = "parameters", "gradients", "optimizer"
GATHERED, MESSAGES, ACTIVATIONS = "gathered parameters", "messages", "activations"
HOST = "host"
"""Memory beside the device's; no part of a peak."""


class TrackMemory(TorchDispatchMode):
    """Logs the storages made and freed inside the block.

    Attributes:
        kind: what new storages are, unless `label` says otherwise later; set it when a new phase begins.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._log: list[tuple[int, int]] = []  # (storage, change of its bytes)
        self._kinds: dict[int, str] = {}
        self._fixed: set[int] = set()
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Any:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._see_storage(storage, GATHERED)  # FSDP2 alone frees and fills storages this way
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]  # no operator of the dispatcher
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls again with what it is made of
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if is_collective(func):
            for leaf in tree_leaves(args):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
                    self._mark(leaf, MESSAGES)
        return result

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Say what the storages behind these tensors are, from their allocation on and for good."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor)
                entry = self._sizes.get(local(tensor).untyped_storage())
                if entry is not None:
                    self._kinds[entry[0]] = kind
                    self._fixed.add(entry[0])

    def mark(self) -> int:
        """The present place in the log, for `peak`."""
        return len(self._log)

    def now(self, kind: str) -> int:
        """Bytes of a kind that are alive."""
        return sum(change for storage, change in self._log if self._kinds[storage] == kind)

    def peak(self, since: int = 0) -> dict[str, int]:
        """Bytes by kind when most bytes were alive, from a place in the log on."""
        alive: Counter[str] = Counter()
        total, most, at_peak = 0, -1, alive
        for place, (storage, change) in enumerate(self._log):
            if self._kinds[storage] == HOST:
                continue
            alive[self._kinds[storage]] += change
            total += change
            if place >= since - 1 and total > most:
                most, at_peak = total, alive.copy()
        return {kind: size for kind, size in at_peak.items() if size}

    def _see(self, tensor: Tensor) -> None:
        tensor = local(tensor)
        if tensor.device.type != "meta":
            self._see_storage(tensor.untyped_storage(), self.kind)

    def _see_storage(self, storage: torch.UntypedStorage, kind: str) -> None:
        size = storage.nbytes()
        entry = self._sizes.get(storage)
        if entry is None:
            entry = [len(self._kinds), 0]
            self._kinds[entry[0]] = kind
            self._sizes[storage] = entry
            weakref.finalize(storage, self._freed, entry)
        elif kind == GATHERED and entry[0] not in self._fixed:
            self._kinds[entry[0]] = kind
        self._change(entry, size)

    def _mark(self, tensor: Tensor, kind: str) -> None:
        number = self._sizes[local(tensor).untyped_storage()][0]
        if self._kinds[number] == ACTIVATIONS and number not in self._fixed:
            self._kinds[number] = kind

    def _freed(self, entry: list[int]) -> None:
        self._change(entry, 0)

    def _change(self, entry: list[int], size: int) -> None:
        if size != entry[1]:
            self._log.append((entry[0], size - entry[1]))
            entry[1] = size
