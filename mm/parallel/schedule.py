"""Runs megatron-core's pipeline schedules over the micro-batches of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mm.parallel.apply import ParallelModel
from mm.parallel.boundary import BoundaryShape, SequenceLengths
from mm.parallel.pipeline_messages import PipelineMessages
from mm.parallel.stage import WanStage

MicroBatchT = TypeVar("MicroBatchT")

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The last stage's output -> (loss of this rank's tokens, what to report of it)."""

ForwardStep = Callable[[WanStage, Any, MicroBatchT], tuple[Tensor, LossFunction]]
"""(stage, the module to call for it, micro-batch) -> (its output, loss function)."""


def forward_backward(
    parallel: ParallelModel,
    forward_step: ForwardStep[MicroBatchT],
    micro_batches: Sequence[MicroBatchT],
    lengths_of: Callable[[MicroBatchT], SequenceLengths],
) -> list[Tensor]:
    """Forward and backward of every micro-batch in the order of the schedule; gradients add up, averaged over them.

    Args:
        parallel: the model on the mesh.
        forward_step: runs one stage on one micro-batch. The loss function it returns is only called on the last
            stage; the losses of the ranks that share a sample add up to the sample's.
        micro_batches: of this replica, the same on all ranks that share them.
        lengths_of: sizes of a micro-batch, for the boundaries' shapes.

    Returns:
        What the loss function reported for each micro-batch, on the last pipeline stage; empty elsewhere.
    """
    layout = parallel.mesh.layout
    rows = _boundary_rows(parallel, [lengths_of(batch) for batch in micro_batches])
    stage_of = dict(zip(map(id, parallel.chunks), parallel.stages, strict=True))
    for stage in parallel.stages:
        stage.boundary_rows = rows

    def call(batches: Iterator[MicroBatchT], module: Any, *unused: Any) -> tuple[Tensor, LossFunction]:
        with parallel.backend.model_code():
            output, loss_function = forward_step(stage_of[id(module)], module, next(batches))

        def loss(tensor: Tensor) -> tuple[Tensor, Tensor]:
            with parallel.backend.model_code():
                return loss_function(tensor)

        return output, loss

    # Every virtual stage passes over the same micro-batches, each with its own iterator.
    iterators = [iter(micro_batches) for _ in parallel.chunks]
    with parallel.backend.megatron():
        for chunk in parallel.chunks:
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
        reported: list[Tensor] = get_forward_backward_func(layout.pp_size, _virtual(parallel))(
            forward_step_func=call,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=parallel.chunks,
            num_microbatches=len(micro_batches),
            # The schedule divides by the context-parallel size: it expects the tokens of the whole sample.
            seq_length=rows * layout.cp_size,
            micro_batch_size=1,
            forward_only=False,
            p2p_communicator=PipelineMessages(
                parallel.mesh.groups.pp, parallel.mesh.pp_backward, parallel.config, parallel.backend.device
            ),
            pg_collection=parallel.mesh.groups,
        )
    return reported


def _virtual(parallel: ParallelModel) -> int | None:
    return parallel.mesh.layout.vp_size if parallel.mesh.layout.vp_size > 1 else None


def _boundary_rows(parallel: ParallelModel, micro_batches: Sequence[SequenceLengths]) -> int:
    """Rows of the step's largest micro-batch.

    Every rank of a pipeline knows the step's micro-batches, so no shapes are exchanged; smaller ones are padded.
    """
    model = parallel.mesh.tokens, parallel.wan, parallel.dtype
    return max(BoundaryShape.of(lengths, *model).rows for lengths in micro_batches)
