"""Traffic of a rank, counted at the collectives.

Every message of torch.distributed passes torch's dispatcher as an operator of the namespace `c10d`, whoever sends it:
our own context and tensor parallelism, megatron-core's schedules and DDP, FSDP2; in forward, backward and optimizer;
over real process groups and over the fake ones of a dry run. So one dispatch mode sees all of them.

Sizes follow the ring algorithms. With P ranks, all-gather and reduce-scatter send (P-1)/P of the whole tensor,
all-reduce is one after the other and sends twice that, all-to-all keeps 1/P of its buffer at home, and a broadcast
passes its tensor on from rank to rank, (P-1)/P of it on average.

Source of the sizes: Thakur et al. 2005, "Optimization of collective communication operations in MPICH", section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.parallel.mesh import Mesh

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, SEND, BROADCAST, BARRIER = "all-to-all", "send", "broadcast", "barrier"

_SHARES: dict[str, Callable[[int], float]] = {
    ALL_REDUCE: lambda size: 2 * (size - 1) / size,
    ALL_GATHER: lambda size: (size - 1) / size,
    REDUCE_SCATTER: lambda size: (size - 1) / size,
    ALL_TO_ALL: lambda size: (size - 1) / size,
    BROADCAST: lambda size: (size - 1) / size,
    SEND: lambda size: 1.0,
    BARRIER: lambda size: 0.0,
}

_OPERATORS: dict[str, tuple[str, int, int]] = {
    "allreduce_": (ALL_REDUCE, 0, 1),
    "allreduce_coalesced_": (ALL_REDUCE, 0, 1),
    "_allgather_base_": (ALL_GATHER, 0, 2),
    "allgather_": (ALL_GATHER, 0, 2),
    "allgather_into_tensor_coalesced_": (ALL_GATHER, 0, 2),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1, 2),
    "reduce_scatter_": (REDUCE_SCATTER, 1, 2),
    "reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1, 2),
    "alltoall_base_": (ALL_TO_ALL, 1, 2),
    "alltoall_": (ALL_TO_ALL, 1, 2),
    "broadcast_": (BROADCAST, 0, 1),
    "send": (SEND, 0, 1),
    "barrier": (BARRIER, 0, 1),
}
"""Operator of `c10d` -> (what it is called here, the argument that is the whole buffer, the one that is the group)."""

_SILENT = {"c10d::recv_", "_c10d_functional::wait_tensor"}
"""They send nothing."""


@dataclass(frozen=True)
class CollectiveCall:
    """One collective that this rank took part in.

    Attributes:
        axis: of the rank grid, as in `axes_of`. operation: such as `all-reduce`.
        group_size: ranks of the group. whole_bytes: of the buffer that the shares are taken of.
    """

    axis: str
    operation: str
    group_size: int
    whole_bytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank sends."""
        return self.whole_bytes * _SHARES[self.operation](self.group_size)


@dataclass(frozen=True)
class CallTotals:
    """A number of calls, and the bytes they sent in all."""

    calls: int
    bytes: float


Traffic = dict[tuple[str, str], CallTotals]
"""(axis, operation) -> what was sent."""


class CountTraffic(TorchDispatchMode):
    """Records every collective inside the block; `calls` has them in order.

    A group of one rank sends nothing and is left out.

    Args:
        axes: name of a process group -> its axis, from `axes_of`; other groups are called `other`.

    Raises:
        NotImplementedError: for an operator whose size is not known here; nothing is left out in silence.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.calls: list[CollectiveCall] = []
        self._axes = axes

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it calls again with what it is made of
        if func.namespace in ("c10d", "_c10d_functional"):
            self._record(func, args)
        return func(*args, **(kwargs or {}))

    def _record(self, func: Any, args: tuple[Any, ...]) -> None:
        if func._schema.name in _SILENT:
            return
        name = func._schema.name.partition("::")[2]
        if func.namespace != "c10d" or name not in _OPERATORS:
            raise NotImplementedError(f"the traffic of {func._schema.name} is not known")
        operation, buffer, group = _OPERATORS[name]
        ranks = dist.ProcessGroup.unbox(args[group])
        if ranks.size() == 1:
            return
        axis = self._axes.get(ranks.group_name, "other")
        self.calls.append(CollectiveCall(axis, operation, ranks.size(), _bytes(args[buffer])))


def totals(calls: Iterable[CollectiveCall]) -> Traffic:
    """Calls and bytes by axis and operation."""
    found: Traffic = {}
    for call in calls:
        before = found.get((call.axis, call.operation), CallTotals(0, 0.0))
        found[call.axis, call.operation] = CallTotals(before.calls + 1, before.bytes + call.sent_bytes)
    return found


def axes_of(mesh: Mesh) -> dict[str, str]:
    """The axis of every process group of a rank, by the group's name."""
    groups, context = mesh.groups, mesh.context
    named = [
        ("world", dist.group.WORLD),
        ("tp", groups.tp),
        ("pp", groups.pp),
        ("pp", mesh.pp_backward),
        ("dp_cp", groups.dp_cp),
        ("cp", groups.cp),
        ("ulysses", context.ulysses),
        ("ring", context.ring),
        ("ring", context.ring_overlap),
        ("ring", context.ring_outer),
    ]
    if mesh.zero is not None:
        named += [("zero3", mesh.zero["shard"].get_group()), ("zero-replicate", mesh.zero["replicate"].get_group())]
    return {group.group_name: axis for axis, group in named if group is not None}


def _bytes(buffer: Any) -> int:
    """Bytes of a tensor, or of all in nested lists; of the elements, not of the storage they are views of."""
    if isinstance(buffer, Tensor):
        return 0 if buffer.numel() == 0 else buffer.numel() * buffer.element_size()
    return sum(map(_bytes, buffer))


def is_collective(func: Any) -> bool:
    """Tell an operator of torch.distributed's, as a dispatch mode sees it, from others."""
    return isinstance(func, torch._ops.OpOverload) and func.namespace == "c10d"
