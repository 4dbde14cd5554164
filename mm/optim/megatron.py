"""Updates over megatron-core's DDP buffers, with or without its distributed optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from mm.optim.algorithms.base import Algorithm
from mm.optim.algorithms.make import ALGORITHMS
from mm.optim.optimizer import LR_SCALE, Optimizer, ParamShard
from mm.optim.settings import UpdateSettings
from mm.parallel.apply import ParallelModel


class MegatronOptimizer(Optimizer):
    """megatron-core's optimizers with our own gradient norm, and any algorithm inside them."""

    def __init__(self, parallel: ParallelModel, settings: UpdateSettings) -> None:
        algorithm = ALGORITHMS[settings.optimizer]
        with parallel.backend.megatron():
            config = _config(parallel, settings)
            self._inner = get_megatron_optimizer(
                config,
                parallel.chunks,
                {**get_standard_config_overrides(config), **_scaled(parallel)},
                use_gloo_process_groups=False,
                pg_collection=parallel.mesh.groups,
            )
            for optimizer in self._inner.chained_optimizers:
                if optimizer.optimizer is not None:  # its distributed optimizer takes nothing else at first
                    optimizer.optimizer = algorithm.take_over(optimizer.optimizer, settings)
            names = {parameter: name for name, parameter in parallel.named_parameters().items()}
            shards = [
                shard
                for optimizer in self._inner.chained_optimizers
                for shard in _shards_of(optimizer, names, parallel, algorithm)
            ]
            super().__init__(parallel, settings, shards)

    def _groups_holder(self) -> Any:
        return self._inner

    def _torch_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for optimizer in self._inner.chained_optimizers:
            if optimizer.optimizer is not None:
                yield optimizer.optimizer

    def _prepare_gradients(self) -> None:
        with self._parallel.backend.megatron():
            self._inner.prepare_grads()

    def apply_gradients(self, norm: float) -> None:
        """See `Optimizer`."""
        self.clip(norm)
        with self._parallel.backend.megatron():
            self._inner.step_with_ready_grads()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """See `Optimizer`."""
        with self._parallel.backend.megatron():
            self._inner.zero_grad()  # else the next backward would add to what a parameter's .grad still points to

    def masters_to_model(self) -> None:
        """Round the master weights into the model's parameters and gather them on every replica."""
        with self._parallel.backend.megatron():
            for optimizer in self._inner.chained_optimizers:
                if hasattr(optimizer, "_copy_main_params_to_model_params"):
                    optimizer._copy_main_params_to_model_params()
            if self._parallel.options.use_distributed_optimizer:
                for chunk in self._parallel.chunks:
                    chunk.start_param_sync(force_sync=True)


def _config(parallel: ParallelModel, settings: UpdateSettings) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        **({} if settings.adam_eps is None else {"adam_eps": settings.adam_eps}),
        clip_grad=settings.clip_grad,
        bf16=parallel.config.bf16,
        params_dtype=parallel.config.params_dtype,
        use_distributed_optimizer=parallel.options.use_distributed_optimizer,
        overlap_param_gather=parallel.options.overlap_param_gather,
    )


def _scaled(parallel: ParallelModel) -> dict[ParamKey, dict[str, float]]:
    """Values of the parameter groups of what has a factor of its own; all ranks make the same groups."""
    scale_of = {
        id(parameter): parallel.lr_scales[name]
        for name, parameter in parallel.named_parameters().items()
        if name in parallel.lr_scales
    }

    def key(scale: float) -> ParamKey:
        return ParamKey(predicate=ParamPredicate(f"{LR_SCALE} {scale}", lambda one: scale_of.get(id(one)) == scale))

    return {key(scale): {LR_SCALE: scale} for scale in sorted(set(parallel.lr_scales.values()))}


def _shards_of(
    optimizer: Any, names: dict[Any, str], parallel: ParallelModel, algorithm: Algorithm
) -> Iterator[ParamShard]:
    """The three optimizers of megatron-core keep their masters in three ways."""
    inner = optimizer.optimizer
    mesh = parallel.mesh

    def shard(parameter: Any, start: int, stop: int, master: torch.Tensor, *, copied_by_data: bool) -> ParamShard:
        name = names[parameter]
        placement = parallel.placements[name]
        owned = (placement.sharded or mesh.tp_rank == 0) and not (copied_by_data and mesh.dp_cp_rank > 0)
        return ParamShard(name, placement, start, stop, owned, master.detach().view(-1), algorithm, inner, master)

    if isinstance(optimizer, DistributedOptimizer):
        pairs = (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        )
        for model_groups, master_groups in pairs:
            for parameters, masters in zip(model_groups, master_groups, strict=True):
                for parameter, master in zip(parameters, masters, strict=True):
                    kept = optimizer._get_model_param_range_map(parameter)["param"]
                    yield shard(parameter, kept.start, kept.end, master, copied_by_data=False)
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
        yield shard(parameter, 0, parameter.numel(), master, copied_by_data=True)
