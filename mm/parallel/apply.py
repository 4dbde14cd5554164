"""Puts a single-device model on the mesh.

The order, from the inside out: the model's parts for this rank's tensor- and context-parallel axes; the pipeline
stages cut out of it; what is added to them (`mm.parallel.trainable_extension`); their weights, of which only this
rank's part is ever made; then either megatron-core's DistributedDataParallel, which owns the buffers of parameters and
gradients, or layer-zero, which shards the parameters. megatron-core's schedules drive the result. Each layer knows only
the one below it, and the model knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from mm.config.layerzero import ZeroConfig
from mm.config.model import WanConfig
from mm.device.backend import Backend
from mm.ops.attention.api import Attend, attention
from mm.parallel.context import context_attention
from mm.parallel.layerzero import local_rows, shard_stage
from mm.parallel.mesh import Mesh
from mm.parallel.placement import Placement, Shape, place, whole_shapes
from mm.parallel.stage import WanStage, cut
from mm.parallel.tensor import TensorAxis
from mm.parallel.trainable_extension import TrainableExtension
from mm.wan.compile import compile_blocks, graphs_needed
from mm.wan.layers import BlockRunner, ModuleFactories, run_in_order
from mm.wan.model import WanModel

ValueOf = Callable[[str, Shape], Tensor]
"""(native name, shape of the whole parameter) -> its value on the CPU."""

WriteValue = Callable[[str, Tensor], None]
"""(native name, tensor of this rank's part) writes the parameter's value to the tensor."""

PutWeights = Callable[[WanModel, Callable[[ValueOf], WriteValue]], object]
"""(this rank's part of a model on the meta device, what makes a writer of values) gives the part its weights."""


@dataclass(frozen=True)
class DataParallelOptions:
    """Distribution of gradients and optimizer state over the replicas; the fields are the flags of the same names."""

    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


@dataclass(frozen=True)
class ParallelModel:
    """A model on the mesh.

    Attributes:
        stages: this rank's parts of the model, one for each virtual pipeline stage.
        chunks: the same as the schedule drives them: in megatron-core's DDP, or sharded by layer-zero.
        wan: shape of the whole model. config: megatron-core's view of it.
        options: data-parallel options. zero: layer-zero's configuration, or None.
        placements: where every parameter of this rank lies in the whole one, by native name.
        trained: whole shapes of all parameters that are trained, of all ranks, in an order that all ranks share.
        mesh, backend: where it lives. lr_scales: as of `mm.parallel.trainable_extension.TrainableExtension`.
    """

    stages: list[WanStage]
    chunks: list[Any]
    wan: WanConfig
    config: TransformerConfig
    options: DataParallelOptions
    zero: ZeroConfig | None
    placements: dict[str, Placement]
    trained: dict[str, Shape]
    mesh: Mesh
    backend: Backend
    lr_scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden state and of the bulk of the parameters in forward and backward."""
        return self.stages[0].dtype

    @property
    def last(self) -> bool:
        """True on ranks of the last stage, which compute the loss."""
        return self.stages[-1].last

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's trained parameters by native Wan name."""
        return {name: parameter for name, parameter in self.all_parameters().items() if parameter.requires_grad}

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by native Wan name, frozen ones too."""
        return {name: parameter for stage in self.stages for name, parameter in stage.model.named_parameters()}


def apply(
    wan: WanConfig,
    mesh: Mesh,
    backend: Backend,
    options: DataParallelOptions,
    dtype: torch.dtype,
    value_of: ValueOf | None,
    *,
    zero: ZeroConfig | None = None,
    run_blocks: BlockRunner = run_in_order,
    compiled_for: int | None = None,
    extension: TrainableExtension | None = None,
) -> ParallelModel:
    """Make this rank's part of a model, ready for training.

    Args:
        wan: shape of the model.
        mesh: the rank grid. backend: this process's device.
        options: data-parallel options.
        dtype: of the bulk of the parameters and of what crosses a pipeline boundary.
        value_of: initial values; None leaves zeros for what is loaded next (`Optimizer.masters_to_model`).
        zero: layer-zero's configuration when the layout has it.
        run_blocks: runs the blocks of a stage (`mm.activation.recompute.block_runner`).
        compiled_for: how many sizes of samples blocks are compiled for (`mm.wan.compile`); None leaves them eager.
        extension: what is trained, and what is added for that; None trains all of the model's own parameters.
    """
    layout = mesh.layout
    parts = model_parts(mesh, run_blocks)
    own = whole_shapes(wan)
    shapes, trained = (own, own) if extension is None else ({**own, **extension.shapes}, dict(extension.trained))
    placements = _placements(shapes, mesh)
    with backend.megatron():
        config = _schedule_config(wan, mesh, dtype, options)
        stages = [_stage(wan, parts, config, mesh, dtype, vp_rank) for vp_rank in range(layout.vp_size)]
    for stage in stages:
        if zero is None or extension is not None:  # layer-zero's shards of what is trained are the fp32 masters
            stage.model.to_precision(dtype)
        if extension is not None:
            extension.prepare(stage.model)
            if zero is not None:
                _masters_in_fp32(stage.model)
    chunks: list[Any] = []
    for stage in stages:
        if compiled_for is not None:
            num_graphs = graphs_needed(compiled_for, layout.pp_size > 1)
            # before layer-zero shards them, as in torchtitan
            compile_blocks(stage.blocks, num_graphs, layout.tp_size > 1)
        if zero is not None and mesh.zero is not None:
            added = extension.shapes if extension is not None else ()
            chunks.append(shard_stage(stage, mesh.zero, zero, backend.device, added))
            _fill(stage.model, placements, value_of)
            continue
        stage.model.to_empty(device=backend.device)
        _fill(stage.model, placements, value_of)
        with backend.megatron():
            chunks.append(_wrap(stage, config, mesh, options))
    if zero is None:
        _connect_schedule(config, chunks, options)
    held = {name for stage in stages for name, _ in stage.model.named_parameters()}
    placements = {name: placement for name, placement in placements.items() if name in held}
    scales = {} if extension is None else extension.lr_scales
    return ParallelModel(stages, chunks, wan, config, options, zero, placements, trained, mesh, backend, scales)


def apply_frozen(
    wan: WanConfig,
    mesh: Mesh,
    backend: Backend,
    dtype: torch.dtype,
    value_of: ValueOf,
    zero: ZeroConfig | None = None,
    *,
    extension: TrainableExtension | None = None,
    put: PutWeights | None = None,
    attend: Attend = attention,
) -> ParallelModel:
    """Make this rank's part of a model that is only run, in `dtype` and without what training needs beside it.

    Args:
        wan, mesh, backend, dtype, zero: as for `apply`.
        value_of: the values.
        extension: what is added to the model; nothing of it is trained.
        put: gives the part its weights; None puts `value_of` on the device. Not for layer-zero.
        attend: self attention to a whole sequence.
    """
    layout = mesh.layout
    parts = model_parts(mesh, run_in_order, attend)
    shapes = {**whole_shapes(wan), **(extension.shapes if extension is not None else {})}
    placements = _placements(shapes, mesh)
    options = DataParallelOptions()
    with backend.megatron():
        config = _schedule_config(wan, mesh, dtype, options)
        stages = [_stage(wan, parts, config, mesh, dtype, vp_rank) for vp_rank in range(layout.vp_size)]
    for stage in stages:
        stage.model.to_precision(dtype).requires_grad_(False)
        if extension is not None:
            extension.prepare(stage.model)
        if put is not None:
            put(stage.model, partial(_written, placements))
            continue
        if zero is not None and mesh.zero is not None:
            shard_stage(stage, mesh.zero, zero, backend.device)
        else:
            stage.model.to_empty(device=backend.device)
        _fill(stage.model, placements, value_of)
    return ParallelModel(stages, list(stages), wan, config, options, zero, placements, {}, mesh, backend)


def model_parts(mesh: Mesh, run_blocks: BlockRunner, attend: Attend = attention) -> ModuleFactories:
    """Factories of this rank's modules: linears and norms of its share, attention over its groups."""
    self_attention = context_attention(mesh.context, attend)
    if mesh.layout.tp_size == 1:
        return ModuleFactories(self_attention=self_attention, run_blocks=run_blocks)
    axis = TensorAxis(mesh.groups.tp, mesh.layout.sequence_parallel)
    return ModuleFactories(
        column=axis.column,
        row=axis.row,
        columns=axis.columns,
        qk_norm=axis.qk_norm,
        self_attention=self_attention,
        run_blocks=run_blocks,
    )


def _masters_in_fp32(model: WanModel) -> None:
    """Put what is trained of a stage on the meta device in fp32, beside frozen parameters of the training dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _placements(shapes: Mapping[str, Shape], mesh: Mesh) -> dict[str, Placement]:
    """Placement of this tensor-parallel rank's part of every parameter, by native name, given the whole shapes."""
    return {name: place(name, shape, mesh.tp_rank, mesh.layout.tp_size) for name, shape in shapes.items()}


def _stage(
    wan: WanConfig, parts: ModuleFactories, config: TransformerConfig, mesh: Mesh, dtype: torch.dtype, vp_rank: int
) -> WanStage:
    layout = mesh.layout
    first = mesh.pp_rank == 0 and vp_rank == 0
    last = mesh.pp_rank == layout.pp_size - 1 and vp_rank == layout.vp_size - 1
    with torch.device("meta"):
        model = WanModel(wan, parts)
    blocks = layout.blocks(mesh.pp_rank, vp_rank) if layout.stages else range(wan.num_layers)
    cut(model, blocks, first=first, last=last)
    return WanStage(
        config,
        model,
        first=first,
        last=last,
        tokens=mesh.tokens,
        dtype=dtype,
        vp_stage=vp_rank if layout.vp_size > 1 else None,
    )


def _written(placements: Mapping[str, Placement], value_of: ValueOf) -> WriteValue:
    """Writer of this rank's part of the values."""

    def write(name: str, target: Tensor) -> None:
        target.copy_(placements[name].of(value_of(name, placements[name].global_shape)))

    return write


@torch.no_grad()
def _fill(model: WanModel, placements: dict[str, Placement], value_of: ValueOf | None) -> None:
    """Set this rank's part of every parameter, one whole parameter in host memory at a time."""
    for name, parameter in model.named_parameters():
        local, start = local_rows(parameter)
        if value_of is None:
            local.zero_()
            continue
        placement = placements[name]
        part = placement.of(value_of(name, placement.global_shape))
        local.copy_(part[start : start + len(local)])


def _schedule_config(wan: WanConfig, mesh: Mesh, dtype: torch.dtype, options: DataParallelOptions) -> TransformerConfig:
    layout = mesh.layout
    return TransformerConfig(
        num_layers=layout.pp_size * layout.vp_size,  # only checked against the pipeline; stages may be uneven
        hidden_size=wan.hidden_size,
        num_attention_heads=wan.num_heads,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vp_size if layout.vp_size > 1 else None,
        context_parallel_size=layout.cp_size,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        # Batched messages need a device-wide synchronisation after each, and between two ranks that are each other's
        # neighbour on both sides they arrive swapped, which gives wrong losses without any error.
        batch_p2p_comm=False,
        overlap_p2p_comm=layout.vp_size > 1,
        # The interleaved schedule would free what is still being sent; the other one waits for its messages first.
        deallocate_pipeline_outputs=layout.vp_size == 1,
    )


def _wrap(
    stage: WanStage, config: TransformerConfig, mesh: Mesh, options: DataParallelOptions
) -> DistributedDataParallel:
    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=options.use_distributed_optimizer,
            overlap_grad_reduce=options.overlap_grad_reduce,
            overlap_param_gather=options.overlap_param_gather,
        ),
        stage,
        disable_bucketing=bool(stage.vp_stage),  # only the first chunk's reduction is on the critical path
        pg_collection=mesh.groups,
    )


def _connect_schedule(config: TransformerConfig, chunks: list[Any], options: DataParallelOptions) -> None:
    """Tell the schedule when gradients may be reduced and parameters gathered."""

    def finalize(model: list[Any], *args: object, **kwargs: object) -> None:
        del args, kwargs
        for chunk in model:
            chunk.finish_grad_sync()

    config.finalize_model_grads_func = finalize
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if options.overlap_param_gather:
        gathers = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = gathers if len(gathers) > 1 else gathers[0]
