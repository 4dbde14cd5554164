"""The rank grid of a run: how many processes along each axis, and this process's groups.

Sizes come in, groups come out, and they travel as parameters from here on; nothing else looks a group up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from mm.errors import ConfigError


@dataclass(frozen=True)
class MeshSizes:
    """Degrees of the model-parallel axes; what is left of the world is data parallel."""

    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1

    def dp_size(self, world_size: int) -> int:
        """Data-parallel replicas in a world of that size.

        Raises:
            ConfigError: CFG-032 when the axes do not divide the world.
        """
        replica = self.tp_size * self.pp_size * self.cp_size
        if world_size % replica:
            raise ConfigError(
                "CFG-032",
                f"{world_size} processes do not divide by TP {self.tp_size} x PP {self.pp_size} x CP {self.cp_size}.",
                f"Start a multiple of {replica} processes, or change TP, PP or CP.",
            )
        return world_size // replica


@dataclass(frozen=True)
class Mesh:
    """This process's coordinates and groups.

    Attributes:
        sizes: degrees of the model-parallel axes.
        dp_rank, dp_size: coordinate and degree along the data-parallel axis.
        groups: megatron-core's process groups by axis.
    """

    sizes: MeshSizes
    dp_rank: int
    dp_size: int
    groups: ProcessGroupCollection

    def average_over_data(self, values: list[float]) -> list[float]:
        """Mean of each value over the data-parallel replicas, the same on every rank, summed in fp64 on the CPU."""
        if self.dp_size == 1:
            return values
        gathered: list[list[float] | None] = [None] * self.dp_size
        dist.all_gather_object(gathered, values, group=self.groups.dp)
        columns = zip(*(row for row in gathered if row is not None), strict=True)
        return [sum(column) / self.dp_size for column in columns]


@contextlib.contextmanager
def build_mesh(sizes: MeshSizes, timeout_minutes: int) -> Iterator[Mesh]:
    """Create the process groups for the length of a block. The job must be joined (`mm.parallel.launch.Job`).

    Raises:
        ConfigError: CFG-032 when the sizes do not divide the world.
    """
    sizes.dp_size(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp_size,
        pipeline_model_parallel_size=sizes.pp_size,
        context_parallel_size=sizes.cp_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_minutes,
    )
    try:
        groups = ProcessGroupCollection.use_mpu_process_groups()
        yield Mesh(sizes, groups.dp.rank(), groups.dp.size(), groups)
    finally:
        parallel_state.destroy_model_parallel()  # megatron-core keeps them in its module; forget them there
