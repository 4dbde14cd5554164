"""Process groups, one call of torch for each kind of group and process.

torch's usual way has every process call for every group of the job, the many groups that it is not in as well: at 512
ranks hundreds of calls for each kind, and with NCCL each is a split of the whole job's communicator. Here a process
asks for its own group alone, or all groups of a kind come from one split.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Collection, Mapping, Sequence

import torch.distributed as dist


class GroupMaker:
    """Makes the groups of a run. Every process of the job makes the same kinds in the same order.

    Attributes:
        made: name and size of each group of this process, in order.
    """

    def __init__(self, timeout: datetime.timedelta) -> None:
        """Make groups whose collectives may take that long."""
        self._timeout = timeout
        self.made: list[tuple[str, int]] = []

    def make(self, name: str, rank_lists: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
        """This process's group out of groups that do not overlap; None where it is in none of them.

        Args:
            name: what the group is for, for people.
            rank_lists: global ranks of each group, ascending; the same on every process.
        """
        rank = dist.get_rank()
        # A process that is in none makes one of its own: torch's names of groups count those of each process.
        mine = next((list(ranks) for ranks in rank_lists if rank in ranks), [rank])
        if _splits():
            every = [list(ranks) for ranks in rank_lists]
            every += [[other] for other in sorted(set(range(dist.get_world_size())).difference(*every))]
            group = dist.split_group(split_ranks=every, timeout=self._timeout, group_desc=name)
        else:
            group = dist.new_group(mine, timeout=self._timeout, use_local_synchronization=True, group_desc=name)
        if group is None:
            raise AssertionError("a process is in the group that it asks for")
        if not any(rank in ranks for ranks in rank_lists):
            return None
        self.made.append((name, len(mine)))
        return group


def ranks_along(sizes: Mapping[str, int], axes: Collection[str]) -> list[list[int]]:
    """The global ranks of every group along some axes of a rank grid, each ascending.

    Args:
        sizes: of all axes, the outermost first. axes: along which the ranks of a group differ.
    """
    strides, inner = {}, math.prod(sizes.values())
    for axis, size in sizes.items():
        inner //= size
        strides[axis] = inner
    firsts, offsets = [0], [0]
    for axis, size in sizes.items():
        steps = [strides[axis] * place for place in range(size)]
        if axis in axes:
            offsets = [offset + step for offset in offsets for step in steps]
        else:
            firsts = [first + step for first in firsts for step in steps]
    return [[first + offset for offset in offsets] for first in firsts]


def _splits() -> bool:
    """Tell whether groups must be split from the job's communicator: NCCL's, which is tied to this process's device."""
    job = dist.distributed_c10d._get_default_group()
    return job.bound_device_id is not None and bool(job._get_backend(job.bound_device_id).supports_splitting)
