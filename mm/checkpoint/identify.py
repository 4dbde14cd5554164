"""The one answer to "what is at this path": asked once, on one rank, from names and headers; no tensor is read.

Everything that reads weights or adapters is handed the answer (`mm.checkpoint.formats.found.Found`).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm.checkpoint.comm import Comm, SingleProcess, on_every_rank, on_rank_zero
from mm.checkpoint.directory import Policy, Verify, find_latest, holds_checkpoints, require_whole
from mm.checkpoint.formats.found import Found, Wanted, nothing
from mm.checkpoint.formats.table import FORMATS
from mm.checkpoint.manifest import damaged
from mm.checkpoint.record import kind_of
from mm.errors import DataError
from mm.wan.shards import what_instead

__all__ = ["Found", "identify", "latest_checkpoint"]


def identify(
    path: str | Path,
    comm: Comm | None = None,
    *,
    wanted: Wanted = "model",
    policy: Policy = "newest",
    verify: Verify = "size",
) -> Found:
    """Look at `path` and say what is there. Every rank calls it, rank 0 looks, and all get its answer or its error.

    Args:
        path: a file or folder, which need not exist.
        comm: the ranks.
        wanted: which of the two is meant in a folder that has both a model and an adapter under its tool's name.
        policy, verify: of a training run's checkpoints, as for `mm.checkpoint.directory.find_latest`.

    Raises:
        CheckpointError: CKPT-012 and CKPT-013 for a training checkpoint that is damaged, CKPT-010, CKPT-018, CKPT-021,
            CKPT-041, CKPT-042 and CKPT-045 for other systems' checkpoints that are damaged or ambiguous.
        DataError: DATA-020 for a path that rank 0 has and another rank has not (of a run's checkpoints CKPT-012),
            DATA-022 to DATA-025 for safetensors that are damaged or ambiguous.
    """
    path, comm = Path(path), comm or SingleProcess()
    is_checkpoint, of_run = on_rank_zero(comm, lambda: [kind_of(path) is not None, holds_checkpoints(path)])
    folder = path
    if is_checkpoint:
        of_run = False
        require_whole(path, verify, comm)
    elif of_run:
        folder = find_latest(path, policy, verify=verify, comm=comm) or path
    return _described(folder, path, comm, wanted, of_run=of_run)


def latest_checkpoint(
    root: Path, comm: Comm, policy: Policy, verify: Verify, beside: Sequence[Path] = ()
) -> Found | None:
    """The checkpoint that a run which saves into `root` goes on from, the same on every rank; None for a new run.

    Raises:
        CheckpointError: CKPT-013 and CKPT-131 as `mm.checkpoint.directory.find_latest`, whose arguments these are.
    """
    folder = find_latest(root, policy, verify=verify, comm=comm, beside=beside)
    return None if folder is None else _described(folder, root, comm, "model", of_run=True)


def _described(folder: Path, asked: Path, comm: Comm, wanted: Wanted, *, of_run: bool) -> Found:
    """Look at `folder`, which is `asked` or in it; it must be there for every rank."""

    def look() -> dict[str, Any]:
        recognised = (row.recognise(folder, wanted) for row in FORMATS)
        found = next((one for one in recognised if one is not None), None) or nothing(folder, what_instead(folder))
        return {**found.as_json(), "asked": str(asked), "of_run": of_run}

    found = Found.parse(on_rank_zero(comm, look))
    if comm.world_size > 1 and found.format != "absent":
        on_every_rank(comm, lambda: _require_here(found))
    return found


def _require_here(found: Found) -> None:
    if found.path.exists():
        return
    host = socket.gethostname()
    if found.of_run:
        raise damaged(found.path, f"it does not exist on {host}, and rank 0 has it")
    raise DataError(
        "DATA-020",
        f"Weights not found: {found.path} does not exist on {host}, and rank 0 has it.",
        "Copy it to every node, or name a folder that all of them share.",
    )
