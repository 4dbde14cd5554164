"""Counts how often a step reads a value of the device on the host, which makes the host wait for the device.

On a CPU both are the same memory, so it is followed which tensors are of the host on every device: what `Tensor.cpu`
gives, what a generator of the host draws, and what is computed from such tensors alone. Everything else counts as the
device's, which is the stricter side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COPIES = {Tensor.cpu, Tensor.tolist, Tensor.numpy}


class CountHostReads:
    """Counts reads while it is entered.

    Attributes:
        reads: the name of the operator of each read, in order.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        """`on_host`: tensors that are in host memory on every device."""
        self.reads: list[str] = []
        self._kept = list(on_host)  # kept, so that no other storage gets the address of one that is freed
        self._host = {_storage(tensor) for tensor in self._kept}
        self._functions, self._operators = _Functions(self), _Operators(self)

    def __enter__(self) -> CountHostReads:
        self._functions.__enter__()
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        self._functions.__exit__(*error)

    def of_host(self, tensors: Iterable[Any]) -> bool:
        """Whether there are tensors, all of the host."""
        found = [_storage(tensor) in self._host for tensor in tensors if isinstance(tensor, Tensor)]
        return bool(found) and all(found)

    def now_of_host(self, values: Any) -> None:
        """Note results as the host's."""
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._kept.append(tensor)
                self._host.add(_storage(tensor))


class _Functions(TorchFunctionMode):
    """Sees what reads a tensor of host memory without an operator."""

    def __init__(self, counted: CountHostReads) -> None:
        super().__init__()
        self._counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _COPIES or self._counted.of_host(args):
            return result
        self._counted.reads.append(func.__name__)
        if func is Tensor.cpu:
            result = result.clone()  # as on an accelerator: memory of its own
            self._counted.now_of_host(result)
        return result


class _Operators(TorchDispatchMode):
    """Sees `item`, `float`, `bool` and the like, also those inside torch, and what is computed on the host."""

    def __init__(self, counted: CountHostReads) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = tree_leaves([args, kwargs])
        drawn = any(isinstance(value, torch.Generator) and value.device.type == "cpu" for value in inputs)
        if drawn or self._counted.of_host(inputs):
            self._counted.now_of_host(result)
        elif func.overloadpacket is torch.ops.aten._local_scalar_dense:
            self._counted.reads.append(func.overloadpacket.__name__)
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
