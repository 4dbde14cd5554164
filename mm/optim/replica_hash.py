"""Comparison of replicas: ranks that hold the same weights must hold the same bits.

Replicas start from equal weights and apply equal updates, so they never part; where they do, a device or a link has
changed bits, and every step since has mixed the copies.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mm.errors import ReplicaError
from mm.parallel.apply import ParallelModel
from mm.parallel.layerzero import local_rows


def require_equal_replicas(parallel: ParallelModel, step: int) -> None:
    """Compare a hash of all weights over the ranks that should hold the same; every rank calls it.

    Raises:
        ReplicaError: NUM-003, on every rank, naming the ranks whose weights differ from most of the others'.
    """
    mesh = parallel.mesh
    shard = mesh.zero["shard"].get_local_rank() if mesh.zero is not None else 0
    mine = torch.tensor([mesh.pp_rank, mesh.tp_rank, shard], dtype=torch.int64, device=parallel.backend.device)
    everyone = mesh.gather(torch.cat([mine, weights_hash(parallel).view(1)])).tolist()
    kinds: dict[tuple[int, ...], dict[int, int]] = {}
    for rank, (*kind, found) in enumerate(everyone):
        kinds.setdefault(tuple(kind), {})[rank] = found
    wrong: list[int] = []
    for hashes in kinds.values():
        usual = Counter(hashes.values()).most_common(1)[0][0]
        wrong += [rank for rank, found in hashes.items() if found != usual]
    if wrong:
        raise ReplicaError(
            "NUM-003",
            f"After step {step} the weights of {'rank' if len(wrong) == 1 else 'ranks'} "
            f"{', '.join(map(str, sorted(wrong)))} differ from those of the other replicas.",
            "Test these devices and their links; go on from a checkpoint that is no newer than the last comparison.",
        )


@torch.no_grad()
def weights_hash(parallel: ParallelModel) -> Tensor:
    """Hash of the bits of all parameters that this rank holds, in the model's order; int64 scalar on the device.

    A sum, in integers that wrap around, of every element's bits times an odd number that depends on its place: any
    single change shows, and the order of summation does not matter.
    """
    total = torch.zeros((), dtype=torch.int64, device=parallel.backend.device)
    for index, parameter in enumerate(parallel.all_parameters().values()):
        local = local_rows(parameter)[0].detach().contiguous().view(-1)
        whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
        bits = local.view(whole).to(torch.int64)
        places = torch.arange(len(bits), device=bits.device, dtype=torch.int64) * 2 + 1
        total += (bits * places).sum() * (2 * index + 1)
    return total
