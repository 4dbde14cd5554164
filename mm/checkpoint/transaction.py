"""The order in which a checkpoint of any format is written by all ranks, and becomes one by a rename.

A process may die between any two of these and lose no committed checkpoint:
free space -> new temporary folder -> the ranks' files, hashed and forced to disk -> all ranks report -> what describes
them -> rename -> tracker -> marker -> deletion of old ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.checkpoint import fault
from mm.checkpoint.comm import Comm, on_every_rank, on_rank_zero
from mm.checkpoint.directory import announce, commit, folder_name, require_replaceable, retain
from mm.checkpoint.files import remove_folder, require_free_space, sync_folder, temporary_name
from mm.checkpoint.lock import Lock
from mm.checkpoint.manifest import FileRecord
from mm.errors import CheckpointError

log = logging.getLogger(__name__)


def write_checkpoint(
    root: Path,
    step: int,
    num_bytes: int,
    write: Callable[[Path], Any],
    complete: Callable[[Path, Sequence[Any]], None],
    comm: Comm,
    *,
    keep_latest: int | None,
    lock: Lock | None = None,
) -> Path:
    """Write the checkpoint of `step` below `root`; every rank calls it, inside `mm.checkpoint.directory.writing`.

    Args:
        root: the folder of the run's checkpoints, shared by all ranks.
        step: optimizer steps taken.
        num_bytes: that all ranks together are about to write.
        write: on every rank, its files into the temporary folder; returns what `complete` must know, as JSON has it.
        complete: on rank 0, from the folder and the ranks' reports; writes what makes the folder a checkpoint.
        comm: the ranks.
        keep_latest: checkpoints to keep, this one included; None keeps all.
        lock: of `root`, on rank 0; a job that has lost it begins nothing and commits nothing.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: the same on every rank, and nothing is left behind: CKPT-020 for a foreign folder in the place,
            CKPT-030 for too little space, CKPT-031 for what the file system does, CKPT-100 for a lost lock, and what
            `write` and `complete` raise.
    """
    temporary = root / on_rank_zero(comm, lambda: _begin(root, step, num_bytes, lock))
    try:
        fault.point("save.folder_created")
        reports = on_every_rank(comm, lambda: write(temporary))
        fault.point("save.gathered")
        name = on_rank_zero(comm, lambda: _commit(root, temporary, step, reports, complete, lock))
    except BaseException:
        if comm.rank == 0 and temporary.exists():
            remove_folder(temporary)
        elif lock is not None:
            lock.require(look=True)  # whoever has it now has deleted the folder, which is why this failed
        raise
    on_rank_zero(comm, lambda: _finish(root, root / name, step, keep_latest))
    return root / name


def require_visible(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Check that what other ranks wrote is here.

    Raises:
        CheckpointError: CKPT-032.
    """
    for name, record in files.items():
        if not (folder / name).exists() or (folder / name).stat().st_size != record.num_bytes:
            raise CheckpointError(
                "CKPT-032",
                f"{folder / name} was written by another rank and is not visible to rank 0.",
                "Save into a folder that all nodes share.",
            )


def _begin(root: Path, step: int, num_bytes: int, lock: Lock | None) -> str:
    if lock is not None:
        lock.require(look=True)
    root.mkdir(parents=True, exist_ok=True)
    require_replaceable(root, step)
    require_free_space(root, num_bytes)
    fault.point("save.start")
    name = temporary_name(folder_name(step))
    (root / name).mkdir()
    return name


def _commit(
    root: Path,
    folder: Path,
    step: int,
    reports: Sequence[Any],
    complete: Callable[[Path, Sequence[Any]], None],
    lock: Lock | None,
) -> str:
    complete(folder, reports)
    fault.point("save.manifest_written")
    sync_folder(folder)
    fault.point("save.before_rename")
    if lock is not None:
        lock.require(look=True)
    return commit(root, folder, step).name


def _finish(root: Path, checkpoint: Path, step: int, keep_latest: int | None) -> None:
    announce(root, checkpoint, step)
    retain(root, step, keep_latest)
    fault.point("save.done")
    log.debug("saved %s", checkpoint)
