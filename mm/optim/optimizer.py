"""An optimizer on a parallel model: gradients made whole, their norm, clipping, the update, and what each rank owns.

Every element of every parameter is **owned** by exactly one rank of the job, whatever the layout: copies along the
data-, context- or tensor-parallel axes answer for nothing. The gradient norm adds up owned elements and a checkpoint
writes owned elements, so neither can count one twice or drop one.

Two ways of keeping parameters have their own subclass: megatron-core's DDP buffers (`mm.optim.megatron`)
and layer-zero's shards (`mm.optim.layerzero`).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mm.device.copies import to_device
from mm.optim.algorithms.base import Algorithm
from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.clipping import clip_limit
from mm.optim.ema import Average
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import ParallelModel
from mm.parallel.frozen import FrozenShard, frozen_shards
from mm.parallel.placement import Placement, Shape
from mm.parallel.tensor import gradient_is_partial

LR_SCALE = "lr_scale"
"""Key of a parameter group: the factor of its learning rate, where that is not 1."""


@dataclass(frozen=True)
class ParamShard:
    """The part of one parameter whose master weight and optimizer state this rank keeps.

    Attributes:
        name: native Wan name.
        placement: where this rank's parameter lies in the whole one.
        start, stop: the kept range of that parameter, flattened.
        owned: whether this rank answers for the range; the same range on other ranks is a copy.
        master: fp32 master weight of the range, flat and without history.
        algorithm: what is kept of it. inner: the torch optimizer that updates it, and `key`, the tensor under which
            it keeps the state; the gradient is `key.grad`.
    """

    name: str
    placement: Placement
    start: int
    stop: int
    owned: bool
    master: Tensor
    algorithm: Algorithm
    inner: torch.optim.Optimizer
    key: Tensor

    @property
    def gradient(self) -> Tensor:
        """Gradient of the range, flat; whole once `Optimizer.reduce_gradients` was called."""
        if self.key.grad is None:
            raise AssertionError(f"{self.name} has no gradient; was reduce_gradients called?")
        return self.key.grad.view(-1)

    def state(self) -> dict[str, Tensor]:
        """State that the optimizer keeps of the range, by name, each flat; zeros when no step was made yet."""
        kept = self.inner.state[self.key]
        if not kept:
            kept.update(self.algorithm.new_state(self.inner, self.key))
        return {one.name: kept[one.name].view(-1) for one in self.algorithm.state}

    @property
    def state_bytes(self) -> int:
        """Names in `state`, whether it is there yet or not."""
        return self.key.numel() * self.algorithm.bytes_per_element


class Optimizer(abc.ABC):
    """Updates of fp32 master weights on a parallel model, with their learning-rate schedule.

    Attributes:
        algorithm: what does the arithmetic.
        average: of the masters that this rank owns, or None without `UpdateSettings.ema_decay`. It is kept here because
            it follows every update, is sharded like the masters and counts as the optimizer's memory.
    """

    def __init__(self, parallel: ParallelModel, settings: UpdateSettings, shards: Sequence[ParamShard]) -> None:
        self._parallel = parallel
        self._settings = settings
        self.algorithm = ALGORITHMS[settings.optimizer]
        order = {name: position for position, name in enumerate(parallel.trained)}
        self._position = order
        self._shards = sorted(shards, key=lambda shard: order[shard.name])
        self.average: Average | None = None
        if settings.ema_decay is not None:
            owned = {shard.name: shard.master for shard in self._shards if shard.owned}
            self.average = Average(owned, settings.ema_decay)
        self._scheduler = _schedule(settings, self._groups_holder())

    @abc.abstractmethod
    def _groups_holder(self) -> Any:
        """The object whose `param_groups` hold the learning rate."""

    @abc.abstractmethod
    def _torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        """The torch optimizers that do the arithmetic."""

    @abc.abstractmethod
    def _prepare_gradients(self) -> None:
        """Make `ParamShard.gradient` what backward left, reduced over the data- and context-parallel ranks."""

    @abc.abstractmethod
    def apply_gradients(self, norm: float) -> None:
        """Clip by the global `norm`, update masters and model, forget the gradients."""

    @abc.abstractmethod
    def drop_gradients(self) -> None:
        """Forget the gradients; nothing else changes."""

    @abc.abstractmethod
    def masters_to_model(self) -> None:
        """Round the master weights into the model's parameters and gather them where they are kept whole."""

    @property
    def learning_rate(self) -> float:
        """The rate the next step uses, of what has no factor of its own."""
        return float(self._scheduler.get_lr({}))

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Whole shapes of all parameters that are trained, those of other ranks too, in the model's order."""
        return self._parallel.trained

    @property
    def shards(self) -> list[ParamShard]:
        """Every parameter's part that this rank keeps, in the model's order."""
        return self._shards

    @property
    def frozen(self) -> list[FrozenShard]:
        """Every parameter's part that this rank holds and that no step changes, in the model's order."""
        return list(frozen_shards(self._parallel))

    def set_progress(self, consumed_samples: int) -> None:
        """Move the schedule to where it stands after that many samples."""
        self._scheduler.num_steps = consumed_samples
        self._scheduler.step(increment=0)

    def reduce_gradients(self) -> None:
        """Make the gradients of all shards whole: what ranks have parts of is added up."""
        self._prepare_gradients()
        mesh = self._parallel.mesh
        if mesh.layout.tp_size == 1:
            return
        partial = [
            shard.gradient
            for shard in self._shards
            if shard.start < shard.stop and gradient_is_partial(shard.name, mesh.layout.sequence_parallel)
        ]
        if partial:
            together = _flatten_dense_tensors(partial)
            dist.all_reduce(together, group=mesh.groups.tp)
            for gradient, total in zip(partial, _unflatten_dense_tensors(together, partial), strict=True):
                gradient.copy_(total)

    def clip_limit(self, norm: float) -> float:
        """Limit of the global `norm` in this step; 0 where nothing is clipped."""
        return clip_limit(self._settings, self._scheduler.num_steps, norm)

    def clip(self, norm: float) -> None:
        """Scale the reduced gradients, in place, so that their global `norm` is at most `clip_limit`.

        Source of the formula: megatron-core, `clip_grad_by_total_norm_fp32`, which has a temporary of each gradient.
        """
        limit = self.clip_limit(norm)
        scale = limit / (norm + 1e-6)
        gradients = [shard.key.grad for shard in self._shards if shard.key.grad is not None]
        if limit > 0 and scale < 1 and gradients:
            torch._foreach_mul_(gradients, scale)

    def update(self, norm: float, samples: int) -> None:
        """Clip the reduced gradients by their global `norm`, update the weights, advance the schedule by `samples`."""
        self.apply_gradients(norm)
        if self.average is not None:
            self.average.update()
        self._scheduler.step(increment=samples)

    def skip(self, samples: int) -> None:
        """Forget the gradients and keep all weights; the schedule, which follows the data, advances all the same."""
        self.drop_gradients()
        self._scheduler.step(increment=samples)

    def gradient_squares(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of squares of each parameter's whole gradient, and whatever else the ranks add up: one message, one wait.

        Args:
            extra: [n] fp32, as long on every rank, on the device.

        Returns:
            [P] in the order of the whole model, and the sums of `extra` over all ranks, [n]; fp32, on the CPU.
        """
        squares = self._squares([(shard.name, shard.gradient) for shard in self._owned()])
        together = torch.cat([squares, extra.to(squares.device)])
        dist.all_reduce(together)
        told = together.cpu()
        return told[: len(squares)], told[len(squares) :]

    def weight_squares(self) -> Tensor:
        """Sum of squares of each parameter's whole fp32 master, [P] fp32 on the CPU, as `gradient_squares` has them.

        Every rank calls it.
        """
        squares = self._squares([(shard.name, shard.master) for shard in self._owned()])
        dist.all_reduce(squares)
        return squares.cpu()

    def _owned(self) -> list[ParamShard]:
        return [shard for shard in self._shards if shard.owned and shard.start < shard.stop]

    def _squares(self, parts: Sequence[tuple[str, Tensor]]) -> Tensor:
        """Sums of squares of this rank's parts of parameters, [P] fp32 on the device."""
        squares = torch.zeros(len(self._position), device=self._parallel.backend.device)
        if parts:
            norms = torch._foreach_norm([part for _, part in parts])
            places = to_device(torch.tensor([self._position[name] for name, _ in parts]), squares.device)
            squares.index_add_(0, places, torch.stack(norms).float().square())
        return squares

    def steps_made(self) -> int:
        """The updates that the next one depends on the number of; 0 where it does not, or with nothing kept."""
        counts = {int(step) for inner in self._torch_optimizers() for step in self.algorithm.steps_made(inner)}
        if len(counts) > 1:
            raise AssertionError(f"parameters disagree about the optimizer's step count: {sorted(counts)}")
        return counts.pop() if counts else 0

    def set_steps_made(self, count: int) -> None:
        """Set that number on every parameter; the state must be there already."""
        for inner in self._torch_optimizers():
            self.algorithm.set_steps_made(inner, count)


def learning_rates(settings: UpdateSettings, consumed_samples: Sequence[int]) -> list[float]:
    """The rates of steps that begin after so many samples each."""
    schedule = _schedule(settings, SimpleNamespace(param_groups=[{}]))
    rates = []
    for schedule.num_steps in consumed_samples:
        rates.append(float(schedule.get_lr({})))
    return rates


class _Schedule(OptimizerParamScheduler):
    """Megatron's schedule, with a factor on all of it for groups that have one."""

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """The rate of a group."""
        return float(super().get_lr(param_group)) * float(param_group.get(LR_SCALE, 1.0))


def _schedule(settings: UpdateSettings, groups_holder: Any) -> OptimizerParamScheduler:
    """Megatron's schedule, in samples, over the parameter groups of `groups_holder`."""
    return _Schedule(
        groups_holder,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_samples,
        lr_decay_steps=settings.decay_samples,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def norm_of(squares: Tensor) -> float:
    """The L2 norm of gradients of which `squares` holds each parameter's sum of squares."""
    # Added up in fp64 and in the order of the whole model, so that no layout of whole parameters changes a bit.
    return math.sqrt(float(squares.double().sum()))


def is_decayed(name: str, parameter: nn.Parameter | Tensor) -> bool:
    """Apply weight decay to matrices, not to biases and vectors (megatron-core's rule): true for the former."""
    return parameter.dim() > 1 and not name.endswith(".bias")
