"""Updates over layer-zero's shards: a torch optimizer on flat fp32 slices of what FSDP2 keeps on this rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.optimizer import LR_SCALE, Optimizer, ParamShard, is_decayed
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import ParallelModel
from mm.parallel.layerzero import local_rows


@dataclass(frozen=True)
class _Slice:
    """The part of a parameter that this rank updates.

    Attributes:
        parameter: the model's, a DTensor where it is sharded.
        local: what this rank keeps of it, flat. first, last: the range of `local` that this rank updates.
        key: that range as the leaf that torch's optimizer knows.
    """

    parameter: nn.Parameter
    local: Tensor
    first: int
    last: int
    key: Tensor

    @property
    def sharded(self) -> bool:
        return isinstance(self.parameter, DTensor)


class LayerZeroOptimizer(Optimizer):
    """An optimizer of this rank's shards; with `use_distributed_optimizer` the groups that hold copies share the work.

    Each group then updates its part of a shard and the parts are gathered, so that its state is kept once in the job.
    """

    def __init__(self, parallel: ParallelModel, settings: UpdateSettings) -> None:
        if parallel.mesh.zero is None:
            raise ValueError("the layout has no layer-zero")
        self._across = parallel.mesh.zero["replicate"].get_group()
        self._splits = parallel.options.use_distributed_optimizer and self._across.size() > 1
        named = parallel.named_parameters()
        self._slices = {name: self._slice(parameter) for name, parameter in named.items()}
        kinds: dict[tuple[bool, float], list[Tensor]] = {(True, 1.0): []}
        for name, parameter in named.items():
            kind = is_decayed(name, parameter), parallel.lr_scales.get(name, 1.0)
            kinds.setdefault(kind, []).append(self._slices[name].key)
        groups = [
            {
                "params": keys,
                "wd_mult": 1.0 if decayed else 0.0,
                "weight_decay": settings.weight_decay if decayed else 0.0,
                LR_SCALE: lr_scale,
            }
            for (decayed, lr_scale), keys in kinds.items()
        ]
        self._algorithm = ALGORITHMS[settings.optimizer]
        used = [group for group in groups if group["params"]] or groups[:1]  # a stage may have nothing to train
        self._inner = self._algorithm.make(used, settings)
        super().__init__(parallel, settings, [self._shard(name, parallel) for name in named])

    def _slice(self, parameter: nn.Parameter) -> _Slice:
        local = local_rows(parameter)[0].view(-1)
        first, last = 0, local.numel()
        if self._splits and isinstance(parameter, DTensor):
            width = math.ceil(last / self._across.size())
            first = min(self._across.rank() * width, last)
            last = min(first + width, last)
        return _Slice(parameter, local, first, last, local[first:last].detach())

    def _shard(self, name: str, parallel: ParallelModel) -> ParamShard:
        part, mesh = self._slices[name], parallel.mesh
        placement = parallel.placements[name]
        row = math.prod(placement.shape[1:])
        start = local_rows(part.parameter)[1] * row + part.first
        copies = self._across.rank() if part.sharded else mesh.dp_cp_rank  # 0 on the first of equal ones
        first = copies == 0 or (part.sharded and self._splits)
        owned = first and (placement.sharded or mesh.tp_rank == 0)
        stop = start + part.key.numel()
        return ParamShard(name, placement, start, stop, owned, part.key, self._algorithm, self._inner, part.key)

    def _groups_holder(self) -> Any:
        return self._inner

    def _torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        yield self._inner

    def _prepare_gradients(self) -> None:
        """Average the gradients of replicated parameters, which FSDP2 does not know, and hand all to the slices."""
        whole = [part for part in self._slices.values() if not part.sharded]
        gradients = [_gradient(part.parameter).reshape(-1) for part in whole]
        if gradients:
            together = _flatten_dense_tensors(gradients)
            together /= self._parallel.mesh.layout.dp_cp_size
            dist.all_reduce(together, group=self._parallel.mesh.groups.dp_cp)
            for part, total in zip(whole, _unflatten_dense_tensors(together, gradients), strict=True):
                part.key.grad = total.view(-1)
        for part in self._slices.values():
            if part.sharded:
                part.key.grad = _gradient(part.parameter).reshape(-1)[part.first : part.last]

    def apply_gradients(self, norm: float) -> None:
        """See `Optimizer`."""
        self.clip(norm)
        self._inner.step()
        self.drop_gradients()
        self.masters_to_model()

    def drop_gradients(self) -> None:
        """See `Optimizer`."""
        for part in self._slices.values():
            part.parameter.grad = None
            part.key.grad = None

    @torch.no_grad()
    def masters_to_model(self) -> None:
        """Gather what each group updated; without splitting nothing is to do, the shards are the masters."""
        if not self._splits:
            return
        parts = [part for part in self._slices.values() if part.sharded]
        if not parts:
            return
        widths = [math.ceil(part.local.numel() / self._across.size()) for part in parts]
        mine = torch.cat(
            [
                nn.functional.pad(part.key, (0, width - part.key.numel()))
                for part, width in zip(parts, widths, strict=True)
            ]
        )
        everyone = mine.new_empty(self._across.size(), mine.numel())
        dist.all_gather_into_tensor(everyone.view(-1), mine, group=self._across)
        for part, columns in zip(parts, everyone.split(widths, dim=1), strict=True):
            part.local.copy_(columns.reshape(-1)[: part.local.numel()])


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient; zeros where this rank keeps nothing or nothing was computed."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(local_rows(parameter)[0])
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
