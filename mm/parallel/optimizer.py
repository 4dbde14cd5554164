"""megatron-core's optimizers: construction, one step, and the state of every parameter by its name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mm.errors import NumericsError
from mm.parallel.apply import ParallelModel

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW and its learning-rate schedule; the fields are the flags of the same names, lengths in samples."""

    lr: float
    min_lr: float
    lr_decay_style: str
    lr_warmup_init: float
    warmup_samples: int
    decay_samples: int
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float


@dataclass(frozen=True)
class ParamShard:
    """The part of one parameter whose master weight and moments this rank owns.

    Attributes:
        name: native Wan name.
        parameter: the model's parameter, whole on this rank.
        start, stop: the owned range of the flattened parameter.
        master: fp32 master weight of that range, flat and without history; for fp32 parameters the parameter itself.
        inner: the torch optimizer that updates it, and `key`, the tensor under which it keeps the state.
    """

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int
    master: torch.Tensor
    inner: torch.optim.Optimizer
    key: torch.Tensor

    def moment(self, which: str) -> torch.Tensor:
        """`exp_avg` or `exp_avg_sq` of the range, flat; zeros when no step was made yet."""
        state = self.inner.state[self.key]
        if not state:  # the whole entry at once: torch's optimizers take a partial one for a complete one
            state.update({moment: torch.zeros_like(self.key) for moment in MOMENTS})
            if not _counts_by_group(self.inner):
                state["step"] = torch.tensor(0.0)
        return state[which].view(-1)


class Optimizer:
    """AdamW over fp32 master weights on a parallel model, with its learning-rate schedule."""

    def __init__(self, parallel: ParallelModel, settings: AdamWSettings) -> None:
        self._parallel = parallel
        self._settings = settings
        with parallel.backend.megatron():
            self._inner = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=settings.lr,
                    min_lr=settings.min_lr,
                    weight_decay=settings.weight_decay,
                    adam_beta1=settings.adam_beta1,
                    adam_beta2=settings.adam_beta2,
                    adam_eps=settings.adam_eps,
                    clip_grad=settings.clip_grad,
                    bf16=parallel.config.bf16,
                    params_dtype=parallel.config.params_dtype,
                    use_distributed_optimizer=parallel.chunks[0].ddp_config.use_distributed_optimizer,
                    overlap_param_gather=parallel.chunks[0].ddp_config.overlap_param_gather,
                ),
                parallel.chunks,
                use_gloo_process_groups=False,
                pg_collection=parallel.mesh.groups,
            )
            self._scheduler = OptimizerParamScheduler(
                self._inner,
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

    @property
    def learning_rate(self) -> float:
        """The rate the next step uses."""
        return float(self._inner.param_groups[0]["lr"])

    def set_progress(self, consumed_samples: int) -> None:
        """Move the schedule to where it stands after that many samples."""
        self._scheduler.num_steps = consumed_samples
        self._scheduler.step(increment=0)

    def step(self, samples: int) -> float:
        """Clip and apply the gradients in the DDP buffers, then advance the schedule by `samples`.

        Returns:
            The global L2 norm of the gradients before clipping.

        Raises:
            NumericsError: NUM-002 when the norm is not finite; no weight has changed then. The norm is the same on
                every rank, so all of them decide alike.
        """
        with self._parallel.backend.megatron():
            self._inner.prepare_grads()
            norm = float(self._inner.get_grad_norm())
            if not math.isfinite(norm):
                raise NumericsError(
                    "NUM-002",
                    f"The gradient norm is {norm}; no weight was changed.",
                    "Look at the samples of this step; lower --lr, or resume from the checkpoint before.",
                )
            for optimizer in self._inner.chained_optimizers:
                if self._settings.clip_grad > 0 and optimizer.get_parameters():
                    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._settings.clip_grad, norm)
            self._inner.step_with_ready_grads()
            self._inner.zero_grad()  # else the next backward would add to what a parameter's .grad still points to
            self._scheduler.step(increment=samples)
        return norm

    @property
    def saves_here(self) -> bool:
        """Whether this rank's shards belong in a checkpoint: sharded ones on every rank, replicas on the first."""
        sharded = bool(self._parallel.chunks[0].ddp_config.use_distributed_optimizer)
        return sharded or self._parallel.mesh.dp_rank == 0

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every trained parameter by native name."""
        return {name: tuple(parameter.shape) for name, parameter in self._parallel.named_parameters().items()}

    def shards(self) -> list[ParamShard]:
        """Every parameter's part that this rank owns, in the model's order."""
        with self._parallel.backend.megatron():
            names = {parameter: name for name, parameter in self._parallel.named_parameters().items()}
            order = {name: position for position, name in enumerate(names.values())}
            found = [s for optimizer in self._inner.chained_optimizers for s in _shards_of(optimizer, names)]
        return sorted(found, key=lambda shard: order[shard.name])

    def adam_step(self) -> int:
        """AdamW's own step count, which its bias correction needs; 0 before the first step."""
        counts = {int(step) for step in self._inner_steps()}
        if len(counts) > 1:
            raise AssertionError(f"parameters disagree about AdamW's step count: {sorted(counts)}")
        return counts.pop() if counts else 0

    def set_adam_step(self, count: int) -> None:
        """Set AdamW's own step count on every parameter; the moments must be there already."""
        for inner in self._torch_optimizers():
            for group in inner.param_groups:
                if _counts_by_group(inner):
                    group["step"] = count
                    continue
                for key in group["params"]:
                    inner.state[key]["step"] = torch.tensor(float(count))

    def masters_to_model(self) -> None:
        """Round the master weights into the model's parameters and gather them on every replica."""
        with self._parallel.backend.megatron():
            for optimizer in self._inner.chained_optimizers:
                if hasattr(optimizer, "_copy_main_params_to_model_params"):
                    optimizer._copy_main_params_to_model_params()
            if self._parallel.chunks[0].ddp_config.use_distributed_optimizer:
                for chunk in self._parallel.chunks:
                    chunk.start_param_sync(force_sync=True)

    def _torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for optimizer in self._inner.chained_optimizers:
            if optimizer.optimizer is not None:
                yield optimizer.optimizer

    def _inner_steps(self) -> Iterator[Any]:
        for inner in self._torch_optimizers():
            for group in inner.param_groups:
                if _counts_by_group(inner):
                    yield group.get("step", 0)
                    continue
                yield from (inner.state[key]["step"] for key in group["params"] if "step" in inner.state.get(key, {}))


def _counts_by_group(inner: torch.optim.Optimizer) -> bool:
    """Apex's and TransformerEngine's fused Adam count steps once a group, torch's once a parameter."""
    return not isinstance(inner, torch.optim.Adam)


def _shards_of(optimizer: Any, names: dict[torch.nn.Parameter, str]) -> Iterator[ParamShard]:
    """The three optimizers of megatron-core keep their masters in three ways."""
    inner = optimizer.optimizer
    if isinstance(optimizer, DistributedOptimizer):
        pairs = (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        )
        for model_groups, master_groups in pairs:
            for parameters, masters in zip(model_groups, master_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    owned = optimizer._get_model_param_range_map(parameter)["param"]
                    flat = master.detach().view(-1)
                    yield ParamShard(names[parameter], parameter, owned.start, owned.end, flat, inner, master)
        return
    whole: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    if hasattr(optimizer, "float16_groups"):
        for parameters, masters in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            whole += zip(parameters, masters, strict=True)
        for parameters in optimizer.fp32_from_fp32_groups:
            whole += zip(parameters, parameters, strict=True)
    else:
        whole = [(parameter, parameter) for group in inner.param_groups for parameter in group["params"]]
    for parameter, master in whole:
        yield ParamShard(names[parameter], parameter, 0, parameter.numel(), master.detach().view(-1), inner, master)
