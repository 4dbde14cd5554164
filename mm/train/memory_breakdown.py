"""Breakdown of a rank's memory by kind: parameters, gradients, optimizer state, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel
from mm.parallel.placement import local

Phase = Literal[
    "building the model",
    "loading weights",
    "waiting for data",
    "exchanging experts",
    "forward and backward",
    "reducing gradients",
    "the optimizer's update",
    "saving",
    "evaluation and validation",
]


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one rank when an allocation failed.

    Attributes:
        phase: what the rank was doing.
        asked: the allocation that failed; 0 where its size is unknown.
        parameters: of the model, with its gradient buffers while it is being built.
        gradients: what backward adds to. optimizer: fp32 masters, where the model has others, moments, and the average.
        activations: all that was held beyond these when most was: activations, messages, temporaries.
        program: what the process held before the model; 0 where the device holds nothing of it.
        moments_to_come: what the optimizer will make at the end of its first step.
        pinned_host: of the host's memory, beside the device's.
    """

    phase: Phase
    asked: int
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    program: int = 0
    moments_to_come: int = 0
    pinned_host: int = 0

    @property
    def held(self) -> int:
        """All kinds on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.program


def measure(
    phase: Phase,
    asked: int,
    *,
    peak: int,
    program: int,
    models: Sequence[tuple[ParallelModel, Optimizer | None]],
    pinned_host: int = 0,
) -> MemoryBreakdown:
    """The split of this rank's memory. Allocates nothing on the device and next to nothing elsewhere.

    Args:
        phase, asked, program, pinned_host: as in `MemoryBreakdown`.
        peak: bytes of the device, or on the CPU of the process, when most was held.
        models: what is built until now, with its optimizer if that is there.
    """
    if not models:
        return MemoryBreakdown(
            phase, asked, parameters=max(0, peak - program), program=program, pinned_host=pinned_host
        )
    optimizers = [optimizer for _, optimizer in models if optimizer is not None]
    model = [parameter for parallel, _ in models for parameter in parallel.all_parameters().values()]
    shards = [shard for optimizer in optimizers for shard in optimizer.shards]
    states = [shard.inner.state.get(shard.key, {}) for shard in shards]
    counted: set[int] = set()
    parameters = _bytes(model, counted)
    gradients = _bytes((gradient for p in model for gradient in (getattr(p, "main_grad", None), p.grad)), counted)
    state = _bytes((shard.master for shard in shards), counted)
    state += _bytes((value for values in states for value in values.values()), counted)
    averages = [optimizer.average for optimizer in optimizers if optimizer.average is not None]
    state += _bytes((value for average in averages for value in average.values.values()), counted)
    return MemoryBreakdown(
        phase,
        asked,
        parameters,
        gradients,
        state,
        # on the CPU memory that was never written to is not resident, so that the kinds may be more than the peak
        activations=max(0, peak - program - parameters - gradients - state),
        program=program,
        moments_to_come=sum(shard.state_bytes for shard, values in zip(shards, states, strict=True) if not values),
        pinned_host=pinned_host,
    )


def _bytes(tensors: Iterable[object], counted: set[int]) -> int:
    """Bytes of the storages behind the tensors that are not `counted` yet; buffers have many views."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = local(tensor).untyped_storage()
            if storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                total += storage.nbytes()
    return total
