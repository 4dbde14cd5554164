"""Puts a single-device model on the mesh.

The order, from the inside out: the model in its precision, the pipeline stage that megatron-core's schedules drive,
megatron-core's DistributedDataParallel, which owns the parameter and gradient buffers. Each layer knows only the one
below it, and the model knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from mm.device.backend import Backend
from mm.parallel.mesh import Mesh
from mm.wan.model import WanModel


@dataclass(frozen=True)
class DataParallelOptions:
    """How gradients and optimizer state spread over the replicas; the fields are the flags of the same names."""

    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False


class WanStage(MegatronModule):
    """The part of the model that one pipeline rank holds, in the form megatron-core's schedules expect."""

    def __init__(self, config: TransformerConfig, model: WanModel) -> None:
        super().__init__(config)
        self.model = model
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        """Take what the previous stage sent: nothing, while the whole model is one stage."""
        if any(tensor is not None for tensor in tensors):
            raise AssertionError("a stage that holds the whole model received a hidden state")

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The model's velocity; shapes as `WanModel.forward`."""
        return self.model(latents, timestep, text)


@dataclass(frozen=True)
class ParallelModel:
    """A model on the mesh.

    Attributes:
        chunks: megatron-core's DDP modules, one a virtual pipeline stage.
        config: megatron-core's view of the model.
        mesh, backend: where it lives.
    """

    chunks: list[DistributedDataParallel]
    config: TransformerConfig
    mesh: Mesh
    backend: Backend

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters by native Wan name."""
        return {
            name: parameter
            for chunk in self.chunks
            for name, parameter in chunk.module.model.named_parameters()
            if parameter.requires_grad
        }


def apply(
    model: WanModel, mesh: Mesh, backend: Backend, options: DataParallelOptions, dtype: torch.dtype
) -> ParallelModel:
    """Wrap `model` for training on `mesh`.

    Args:
        model: on `backend`'s device, in its final precision and with its weights.
        mesh: the rank grid.
        backend: this process's device.
        options: data-parallel options.
        dtype: dtype of the bulk of the parameters and of what crosses a pipeline boundary.
    """
    with backend.megatron():
        config = TransformerConfig(
            num_layers=model.config.num_layers,
            hidden_size=model.config.hidden_size,
            num_attention_heads=model.config.num_heads,
            tensor_model_parallel_size=mesh.sizes.tp_size,
            pipeline_model_parallel_size=mesh.sizes.pp_size,
            context_parallel_size=mesh.sizes.cp_size,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            gradient_accumulation_fusion=False,
        )
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=options.use_distributed_optimizer,
            overlap_grad_reduce=options.overlap_grad_reduce,
            overlap_param_gather=options.overlap_param_gather,
        )
        chunk = DistributedDataParallel(config, ddp_config, WanStage(config, model), pg_collection=mesh.groups)
        chunk.broadcast_params()
    _connect_schedule(config, chunk, options)
    return ParallelModel([chunk], config, mesh, backend)


def _connect_schedule(config: TransformerConfig, chunk: DistributedDataParallel, options: DataParallelOptions) -> None:
    """Tell the schedule when gradients may be reduced and parameters gathered."""
    config.finalize_model_grads_func = finalize_model_grads
    if options.overlap_grad_reduce:
        config.no_sync_func = chunk.no_sync
    if options.overlap_param_gather:
        config.param_sync_func = chunk.start_param_sync


def forward_backward(parallel: ParallelModel, forward_step: Any, num_microbatches: int) -> list[Any]:
    """Run megatron-core's schedule over the micro-batches of one step; gradients end up in the DDP buffers, averaged.

    Args:
        parallel: the model on the mesh.
        forward_step: `forward_step(module) -> (output, loss function)`; called once for each micro-batch with the
            module to run. The loss function takes the output and returns (loss, what to report).
        num_microbatches: micro-batches of this replica in the step.

    Returns:
        What the loss function reported for each micro-batch, on the last pipeline stage; empty elsewhere.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def call(_: Any, module: Any, *unused: Any) -> Any:
        with parallel.backend.model_code():
            output, loss_function = forward_step(module)

        def loss(tensor: torch.Tensor) -> Any:
            with parallel.backend.model_code():
                return loss_function(tensor)

        return output, loss

    with parallel.backend.megatron():
        for chunk in parallel.chunks:
            chunk.zero_grad_buffer()
        return get_forward_backward_func()(
            forward_step_func=call,
            data_iterator=None,
            model=parallel.chunks,
            num_microbatches=num_microbatches,
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
            pg_collection=parallel.mesh.groups,
        )
