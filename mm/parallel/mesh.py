"""The rank grid of a run: this process's coordinates and groups along each axis.

A `Layout` comes in, groups come out, and they travel as parameters from here on; nothing else looks a group up.
Ranks are numbered with tensor parallelism innermost, then context, data and pipeline parallelism:
rank = tp + TP * (cp + CP * (dp + DP * pp)). So the ranks that talk most are neighbours, which share a node.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.device_mesh import DeviceMesh

from mm.config.layout import Layout
from mm.errors import ConfigError
from mm.parallel.context import ContextGroups, build_context_groups
from mm.parallel.groups import GroupMaker, ranks_along
from mm.parallel.tokens import TokenShare


@dataclass(frozen=True)
class Mesh:
    """This process's coordinates and groups.

    Attributes:
        layout: degrees of all axes.
        tp_rank, cp_rank, dp_rank, pp_rank: coordinates.
        groups: process groups by axis, as megatron-core takes them; its `pp` carries activations.
        pp_backward: the ranks of `groups.pp` on a second communicator, which carries gradients.
        context: groups of context parallelism.
        zero: with layer-zero, the (replicate, shard) mesh over the ranks with the same parameters.
        made: name and size of each group that was made, in order.
    """

    layout: Layout
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    groups: ProcessGroupCollection
    pp_backward: dist.ProcessGroup
    context: ContextGroups
    zero: DeviceMesh | None
    made: tuple[tuple[str, int], ...]

    @property
    def dp_cp_rank(self) -> int:
        """Coordinate among the ranks that hold the same parameters."""
        return self.dp_rank * self.layout.cp_size + self.cp_rank

    @property
    def tokens(self) -> TokenShare:
        """This rank's share of the tokens."""
        sp_rank, sp_size = (self.tp_rank, self.layout.tp_size) if self.layout.sequence_parallel else (0, 1)
        return TokenShare(self.cp_rank, self.layout.cp_size, sp_rank, sp_size, self.layout.ulysses_size)

    def gather_places(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """The places [B, t, D] of each rank of a sequence, in the order of `TokenShare`; without history."""
        everyone = mine.unsqueeze(0)
        for group, size in ((self.groups.tp, self.tokens.sp_size), (self.groups.cp, self.layout.cp_size)):
            if size > 1:
                parts, everyone = everyone.contiguous(), everyone.new_empty(size * len(everyone), *mine.shape)
                dist.all_gather_into_tensor(everyone, parts, group=group)
        return list(everyone)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The 1-D `values` of every process of the job, [world_size, len(values)], on the CPU."""
        if dist.get_world_size() == 1:
            return values.unsqueeze(0).cpu()
        everyone = values.new_empty(dist.get_world_size() * values.numel())
        dist.all_gather_into_tensor(everyone, values.contiguous())
        return everyone.view(-1, values.numel()).cpu()


@contextlib.contextmanager
def build_mesh(layout: Layout, timeout_minutes: int, device_type: str) -> Iterator[Mesh]:
    """Create the process groups that the layout needs, for the length of a block; they stay until the job's end.

    The job must be joined (`mm.supervise.job.Job`). torch names a group by its ranks and the number of groups that
    there are: one made in the place of one taken down would find the addresses of that one in the job's store.

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
    maker = GroupMaker(datetime.timedelta(minutes=timeout_minutes))
    axes = _Axes(layout, maker)
    groups, pp_backward = _engine_groups(axes), axes.group("pp backward", ["pp"])
    context = build_context_groups(
        groups.cp,
        ranks_along(axes.sizes, ["cp"]),
        layout.ulysses_size,
        layout.window_size,
        layout.send_recv_overlap,
        maker,
    )
    zero = _zero_mesh(layout, axes, device_type)
    place = axes.coordinates(dist.get_rank())
    yield Mesh(
        layout,
        place["tp"],
        place["cp"],
        place["dp"],
        place["pp"],
        groups,
        pp_backward,
        context,
        zero,
        tuple(maker.made),
    )


class _Axes:
    """Groups along the axes of the rank grid."""

    def __init__(self, layout: Layout, maker: GroupMaker) -> None:
        self._maker = maker
        self.sizes = {"pp": layout.pp_size, "dp": layout.dp_size, "cp": layout.cp_size, "tp": layout.tp_size}
        self._alone: dist.ProcessGroup | None = None

    def group(self, name: str, axes: Collection[str], sizes: dict[str, int] | None = None) -> dist.ProcessGroup:
        """This process's group; along axes of one rank, the group of this process alone, of which there is one."""
        rank_lists = ranks_along(sizes or self.sizes, axes)
        if len(rank_lists[0]) == 1:
            if self._alone is None:
                self._alone = self._made("this rank alone", rank_lists)
            return self._alone
        return self._made(name, rank_lists)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, by axis."""
        found = {}
        for axis, size in reversed(self.sizes.items()):
            rank, found[axis] = divmod(rank, size)
        return found

    def _made(self, name: str, rank_lists: list[list[int]]) -> dist.ProcessGroup:
        if dist.get_world_size() == 1:
            return dist.distributed_c10d._get_default_group()
        group = self._maker.make(name, rank_lists)
        if group is None:
            raise AssertionError(f"rank {dist.get_rank()} is in no group of {name}")
        return group


def _engine_groups(axes: _Axes) -> ProcessGroupCollection:
    """Groups that megatron-core's schedules, DDP and optimizers ask for; None those that they do not use here.

    `dp` and `expt_dp` are only asked for their sizes, and nobody here is an expert.
    """
    dp_cp = axes.group("dp x cp", ["dp", "cp"])
    return ProcessGroupCollection(
        tp=axes.group("tp", ["tp"]),
        cp=axes.group("cp", ["cp"]),
        pp=axes.group("pp", ["pp"]),
        dp_cp=dp_cp,
        dp=dp_cp,
        expt_dp=dp_cp,
        ep=None,
        mp=None,
        tp_ep_pp=None,
        embd=None,
        pos_embd=None,
        intra_dist_opt=None,
    )


def _zero_mesh(layout: Layout, axes: _Axes, device_type: str) -> DeviceMesh | None:
    if layout.zero3_size is None:
        return None
    sizes = {
        "pp": layout.pp_size,
        "replicate": layout.dp_cp_size // layout.zero3_size,
        "shard": layout.zero3_size,
        "tp": layout.tp_size,
    }
    both = ["replicate", "shard"]
    groups = [axes.group(f"zero {axis}", [axis], sizes) for axis in both]
    ranks = next(ranks for ranks in ranks_along(sizes, both) if dist.get_rank() in ranks)
    grid = torch.tensor(ranks).view(-1, layout.zero3_size)
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=tuple(both))
