"""Statistics of a step, for all ranks in one message before any weight changes: losses, gradients, wishes to stop.

The decisions that follow (update, skip, stop) are taken from these numbers alone, so that all ranks take the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mm.config.layout import Layout
from mm.optim.optimizer import Optimizer, norm_of
from mm.parallel.apply import ParallelModel


@dataclass(frozen=True)
class StepStatistics:
    """A step's gradients, reduced and not yet applied.

    Attributes:
        losses: weighted, of each sample, [replicas, micro-batches, samples] fp64 on the CPU; zeros behind the last
            sample of a micro-batch.
        squares: sum of squares of each parameter's whole gradient, [P] fp32 on the CPU, in the whole model's order.
        asked_to_stop: whether a signal has reached any process.
        samples: of the global batch; None where `losses` has as many numbers.
    """

    losses: Tensor
    squares: Tensor
    asked_to_stop: bool = False
    samples: int | None = None

    @property
    def loss(self) -> float:
        """Mean over the global batch."""
        return float(self.losses.sum() / (self.samples or self.losses.numel()))

    @property
    def grad_norm(self) -> float:
        """Global L2 norm, before clipping."""
        return norm_of(self.squares)

    @property
    def is_finite(self) -> bool:
        """True where the gradients may be applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def gather_statistics(
    parallel: ParallelModel,
    optimizer: Optimizer,
    losses: Tensor,
    asked_to_stop: bool = False,
    samples: int | None = None,
) -> StepStatistics:
    """Tell all ranks of this one's part of a step; every rank calls it, after `Optimizer.reduce_gradients`.

    Args:
        parallel, optimizer: of the run.
        losses: this rank's part of the losses of its replica, [micro-batches, samples]; zeros where it computes none.
        asked_to_stop: whether this process was.
        samples: of the global batch; None where all replicas' losses have as many numbers.
    """
    rank, size = dist.get_rank(), losses.numel()
    extra = torch.zeros(message_size(size), device=losses.device)
    extra[rank * size : (rank + 1) * size] = losses.flatten()
    extra[-1] = float(asked_to_stop)
    squares, extra = optimizer.gradient_squares(extra)
    of_all = of_replicas(parallel.mesh.layout, extra[:-1], losses.shape)
    return StepStatistics(of_all, squares, bool(extra[-1] > 0), samples)


def of_replicas(layout: Layout, parts: Tensor, shape: Sequence[int]) -> Tensor:
    """The losses of each replica, [replicas, *shape] fp64, from the parts of all ranks one after the other."""
    # The rank grid of mm.parallel.mesh. The ranks of a replica have parts of its losses, most of them none.
    return parts.double().view(layout.pp_size, layout.dp_size, -1, *shape).sum(dim=2).sum(dim=0)


def message_size(losses: int) -> int:
    """Numbers in the message beside the gradients' squares, for so many losses of a replica."""
    return dist.get_world_size() * losses + 1
