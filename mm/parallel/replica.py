"""Messages inside of a replica: from its first rank to all that compute the same samples."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mm.parallel.mesh import Mesh


def leads_replica(mesh: Mesh) -> bool:
    """Tell whether this rank is the first of its replica."""
    return mesh.tp_rank == mesh.cp_rank == mesh.pp_rank == 0


def from_first_of_replica(mesh: Mesh, content: bytes, device: torch.device) -> bytes:
    """The content that the first rank of the replica passes, on all its ranks, which call it together.

    It goes down the pipeline first, from there to the ranks of each stage: no group of its own is needed.

    Args:
        mesh: the ranks. content: the first rank's; what the others pass is ignored.
        device: that the groups' messages lie on.
    """
    groups, layout = mesh.groups, mesh.layout
    if mesh.tp_rank == mesh.cp_rank == 0 and layout.pp_size > 1:
        content = _from_first(groups.pp, content, device)
    if mesh.tp_rank == 0 and layout.cp_size > 1:
        content = _from_first(groups.cp, content, device)
    return _from_first(groups.tp, content, device) if layout.tp_size > 1 else content


def _from_first(group: dist.ProcessGroup, content: bytes, device: torch.device) -> bytes:
    source, is_first = dist.get_global_rank(group, 0), dist.get_rank(group) == 0
    length = torch.tensor([len(content)], dtype=torch.int64, device=device)
    dist.broadcast(length, source, group=group)
    if is_first:
        sent = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    else:
        sent = torch.empty(int(length), dtype=torch.uint8, device=device)
    if len(sent):
        dist.broadcast(sent, source, group=group)
    return content if is_first else sent.cpu().numpy().tobytes()
