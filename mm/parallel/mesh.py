"""The rank grid of a run: this process's coordinates and groups along each axis.

A `Layout` comes in, groups come out, and they travel as parameters from here on; nothing else looks a group up.
Ranks are numbered with tensor parallelism innermost, then context, data and pipeline parallelism:
rank = tp + TP * (cp + CP * (dp + DP * pp)). So the ranks that talk most are neighbours, which share a node.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm.config.layout import Layout
from mm.errors import ConfigError
from mm.parallel.context import ContextGroups, build_context_groups
from mm.parallel.tokens import TokenShare


@dataclass(frozen=True)
class Mesh:
    """This process's coordinates and groups.

    Attributes:
        layout: degrees of all axes.
        tp_rank, cp_rank, dp_rank, pp_rank: coordinates.
        groups: megatron-core's process groups by axis.
        context: groups of context parallelism.
        zero: with layer-zero, the (replicate, shard) mesh over the ranks with the same parameters.
    """

    layout: Layout
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    groups: ProcessGroupCollection
    context: ContextGroups
    zero: DeviceMesh | None

    @property
    def dp_cp_rank(self) -> int:
        """Coordinate among the ranks that hold the same parameters."""
        return self.dp_rank * self.layout.cp_size + self.cp_rank

    @property
    def tokens(self) -> TokenShare:
        """This rank's share of a sample's tokens."""
        sp_rank, sp_size = (self.tp_rank, self.layout.tp_size) if self.layout.sequence_parallel else (0, 1)
        return TokenShare(self.cp_rank, self.layout.cp_size, sp_rank, sp_size)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The 1-D `values` of every process of the job, [world_size, len(values)], on the CPU."""
        if dist.get_world_size() == 1:
            return values.unsqueeze(0).cpu()
        everyone = values.new_empty(dist.get_world_size() * values.numel())
        dist.all_gather_into_tensor(everyone, values.contiguous())
        return everyone.view(-1, values.numel()).cpu()


@contextlib.contextmanager
def build_mesh(layout: Layout, timeout_minutes: int, device_type: str) -> Iterator[Mesh]:
    """Create the process groups for the length of a block. The job must be joined (`mm.parallel.launch.Job`).

    Args:
        layout: the degrees; `world_size` must be the job's.
        timeout_minutes: how long a collective may wait.
        device_type: kind of device of the ranks, for the mesh of layer-zero.

    Raises:
        ConfigError: CFG-032 when the layout is made for another number of processes.
    """
    if layout.world_size != dist.get_world_size():
        raise ConfigError(
            "CFG-032",
            f"The layout is made for {layout.world_size} processes, and {dist.get_world_size()} have joined.",
            "Start as many processes as the layout has.",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vp_size if layout.vp_size > 1 else None,
        context_parallel_size=layout.cp_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    try:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        context = build_context_groups(
            groups.cp,
            context_ranks(layout),
            layout.ulysses_size,
            layout.window_size,
            layout.send_recv_overlap,
            datetime.timedelta(minutes=timeout_minutes),
        )
        yield Mesh(
            layout,
            groups.tp.rank(),
            groups.cp.rank(),
            groups.dp.rank(),
            groups.pp.rank(),
            groups,
            context,
            _zero_mesh(layout, device_type),
        )
    finally:
        parallel_state.destroy_model_parallel()  # megatron-core keeps them in its module; forget them there


def context_ranks(layout: Layout) -> list[list[int]]:
    """The global ranks of every context-parallel group, in the order of their context-parallel rank."""
    return [
        [tp + layout.tp_size * (cp + layout.cp_size * replica) for cp in range(layout.cp_size)]
        for replica in range(layout.dp_size * layout.pp_size)
        for tp in range(layout.tp_size)
    ]


def _zero_mesh(layout: Layout, device_type: str) -> DeviceMesh | None:
    if layout.zero3_size is None:
        return None
    shape = (layout.pp_size, layout.dp_cp_size // layout.zero3_size, layout.zero3_size, layout.tp_size)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("pp", "replicate", "shard", "tp"))
    return mesh["replicate", "shard"]
