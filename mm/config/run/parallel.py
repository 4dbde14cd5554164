"""The section `parallel`: how a run is cut over its processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.layerzero import ZeroConfig

ContextAlgorithm = Literal["ulysses", "ring", "hybrid"]


class MeshSection(Section):
    """Degrees that training and generation share. What they leave of the processes is data parallel.

    Attributes:
        tensor_size, context_size: degrees.
        sequence_parallel: cut the tokens outside tensor-parallel layers over the tensor-parallel ranks as well.
        context_algorithm: heads for tokens (ulysses), keys and values in a ring, or rings of ulysses groups (hybrid).
        ulysses_size: ranks of a ulysses group in the hybrid algorithm.
        ring_overlap: the ring sends and receives at the same time.
        ring_window: ring ranks of one window of a double ring; 1 is a single ring.
        layerzero: shard the parameters themselves; None does not.
    """

    tensor_size: int = Field(1, ge=1)
    context_size: int = Field(1, ge=1)
    sequence_parallel: bool = False
    context_algorithm: ContextAlgorithm = "ulysses"
    ulysses_size: int | None = Field(None, ge=1)
    ring_overlap: bool = False
    ring_window: int = Field(1, ge=1)
    layerzero: ZeroConfig | None = None


class ParallelSection(MeshSection):
    """Training's own axes, and how replicas are kept in step.

    Attributes:
        pipeline_size: pipeline-parallel degree. virtual_size: model chunks of one pipeline rank.
        stages: blocks of each stage, one row for each model chunk; None makes them even; unused without a pipeline.
        variable_sizes: samples of different sizes in a pipeline.
        distributed_optimizer: shard master weights and moments over the replicas.
        overlap_grad_reduce, overlap_param_gather: during backward, during forward.
    """

    pipeline_size: int = Field(1, ge=1)
    virtual_size: int = Field(1, ge=1)
    stages: list[list[int]] | None = None
    variable_sizes: bool = False
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
