"""Agreement of ranks that must take the same branch because they exchange weights in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from mm.parallel.mesh import Mesh


def agreement(mesh: Mesh, device: torch.device) -> Callable[[bool], bool]:
    """A function that tells whether a thing holds on all ranks that gather weights together.

    Without layer-zero a rank needs nobody, and the function is the identity: what tensor- and context-parallel ranks
    decide by is the same on each. Replicas have batches of their own, which may differ in it.
    """
    if mesh.zero is None:
        return bool

    def all_say(mine: bool) -> bool:
        word = torch.tensor([mine], dtype=torch.int32, device=device)
        dist.all_reduce(word, dist.ReduceOp.MIN, group=mesh.groups.dp_cp)
        return bool(word.item())

    return all_say
