"""The training checkpoint: saved by any layout of ranks, loaded by any other, committed by one rename.

Each rank hands in pieces, boxes of global tensors under global names; each rank that loads says which boxes it wants.
A checkpoint is a folder of safetensors shards, one a rank, and a JSON manifest of where each box is.

Why not torch.distributed.checkpoint: its own storage reads its index with pickle, and its HuggingFace storage writes
one chunk a tensor name and file, which cannot hold what the distributed optimizer owns: a range of a flattened tensor
is up to 2 N - 1 boxes of it (`boxes.flat_range_to_boxes`). Neither commits by a rename or hashes what it writes.

The order of saving is that of `mm.checkpoint.transaction`; between the ranks' reports and the rename every tensor is
found to be covered exactly once, derived files are written, and the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import mm
from mm.checkpoint import fault
from mm.checkpoint.boxes import Box, intersect, whole
from mm.checkpoint.comm import Comm, SingleProcess, on_every_rank, on_rank_zero
from mm.checkpoint.directory import find_latest, writing
from mm.checkpoint.files import sync_folder, write_new
from mm.checkpoint.lock import Lock
from mm.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    PieceRecord,
    TensorRecord,
    coverage_problem,
    read_manifest,
)
from mm.checkpoint.mismatch import raise_on_mismatch
from mm.checkpoint.pieces import Piece, pieces_of_flat_range, whole_piece
from mm.checkpoint.safetensor_file import DTYPE_NAMES, DTYPES, Entry, write_safetensors
from mm.checkpoint.transaction import require_visible, write_checkpoint
from mm.errors import CheckpointError

__all__ = [
    "Derived",
    "Piece",
    "find_latest",
    "load",
    "pieces_of_flat_range",
    "read_manifest",
    "read_tensor",
    "save",
    "whole_piece",
    "writing",
]


@dataclass(frozen=True)
class Derived:
    """Files beside the shards that say the same in another format; the manifest does not name them.

    Attributes:
        write: (folder, manifest) -> None, on rank 0 when all shards are there; `read_tensor` reads them.
        num_bytes: about how much it writes.
    """

    write: Callable[[Path, Manifest], None]
    num_bytes: int


def save(
    root: Path,
    step: int,
    pieces: Iterable[Piece],
    scalars: dict[str, Any],
    comm: Comm | None = None,
    *,
    keep_latest: int | None = None,
    derived: Derived | None = None,
    lock: Lock | None = None,
) -> Path:
    """Write the checkpoint of `step` below `root`; every rank calls it. Call it inside `writing(root)`.

    Args:
        root: the folder of the run's checkpoints, shared by all ranks.
        step: optimizer steps taken.
        pieces: this rank's; over all ranks each element of each tensor exactly once.
        scalars: state that is no tensor, as JSON; rank 0's is written.
        comm: the ranks.
        keep_latest: checkpoints to keep, this one included; None keeps all.
        derived: files to commit with it, made from its tensors.
        lock: what `writing` gave; a job that has lost it commits nothing.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: the same on every rank, and nothing is left behind: CKPT-014 for pieces that do not add up,
            CKPT-016 for a value that is not finite (in a tensor or a scalar), CKPT-017 for a dtype, CKPT-020 for a
            foreign folder in the place, CKPT-030 for too little space, CKPT-031 and CKPT-032 for what the file system
            does, CKPT-100 for a lost lock.
    """
    comm = comm or SingleProcess()
    pieces = list(pieces)
    num_bytes = sum(on_every_rank(comm, lambda: sum(p.box.numel * p.tensor.element_size() for p in pieces)))
    num_bytes += derived.num_bytes if derived is not None else 0
    on_rank_zero(comm, lambda: _require_numbers(scalars))
    return write_checkpoint(
        root,
        step,
        num_bytes,
        lambda folder: _write_shard(folder, pieces, comm),
        lambda folder, reports: _complete(folder, step, reports, scalars, derived),
        comm,
        keep_latest=keep_latest,
        lock=lock,
    )


def load(
    path: Path,
    wanted: Iterable[Piece],
    comm: Comm | None = None,
    *,
    complete: Sequence[str] = ("",),
    manifest: Manifest | None = None,
) -> None:
    """Fill the tensors of `wanted` from the checkpoint folder `path`; only what intersects them is read.

    Args:
        path: a folder that `find_latest` or `save` returned.
        wanted: this rank's boxes.
        comm: the ranks that load together.
        complete: every tensor of the checkpoint whose key begins with one of these must be wanted by some rank; by
            default all of them. `("model.",)` loads weights alone.
        manifest: that of `path` where it has been read.

    Raises:
        CheckpointError: CKPT-011 for keys, shapes or dtypes that differ, CKPT-012 for a damaged checkpoint; the same
            on every rank, before anything is read.
    """
    comm = comm or SingleProcess()
    wanted = list(wanted)
    manifest = manifest or read_manifest(path)
    reports = on_every_rank(comm, lambda: _differences(manifest, wanted))
    keys = {key for report in reports for key in report["keys"]}
    unexpected = sorted(key for key in manifest.tensors if key not in keys and key.startswith(tuple(complete)))
    raise_on_mismatch(
        str(path),
        sorted({line for report in reports for line in report["missing"]}),
        unexpected,
        sorted({line for report in reports for line in report["different"]}),
    )
    on_every_rank(comm, lambda: _read(path, manifest, wanted))


def read_tensor(path: Path, manifest: Manifest, key: str) -> torch.Tensor:
    """One whole tensor of the checkpoint folder `path`, on the CPU. KeyError when it is not there."""
    record = manifest.tensors[key]
    tensor = torch.empty(record.shape, dtype=DTYPES[record.dtype])
    _read(path, manifest, [whole_piece(key, tensor)])
    return tensor


def _require_numbers(scalars: dict[str, Any]) -> None:
    try:
        json.dumps(scalars, allow_nan=False)
    except ValueError:
        raise CheckpointError(
            "CKPT-016",
            f"The scalars to save hold a number that is not finite: {scalars}.",
            "Resume from the last checkpoint; this state would not continue well.",
        ) from None


def _write_shard(folder: Path, pieces: Sequence[Piece], comm: Comm) -> dict[str, Any]:
    """Write this rank's pieces and return what the manifest needs to know about them."""
    file = f"shard-{comm.rank:05d}-of-{comm.world_size:05d}.safetensors"
    names = [piece.key if piece.box == whole(piece.global_shape) else f"{piece.key}{piece.box}" for piece in pieces]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise _uncovered(f"{twice} was handed in twice by rank {comm.rank}")
    entries = [
        Entry(name, piece.tensor.dtype, piece.box.sizes, piece.tensor.detach)
        for name, piece in zip(names, pieces, strict=True)
    ]
    written = write_safetensors(folder / file, entries)
    sync_folder(folder)
    return {
        "file": file,
        "num_bytes": written.num_bytes,
        "sha256": written.sha256,
        "pieces": [
            [p.key, DTYPE_NAMES[p.tensor.dtype], p.global_shape, name, p.box.offsets, p.box.sizes]
            for name, p in zip(names, pieces, strict=True)
        ],
    }


def _complete(
    folder: Path,
    step: int,
    reports: Sequence[dict[str, Any]],
    scalars: dict[str, Any],
    derived: Derived | None,
) -> None:
    """Check that the shards add up to whole tensors and describe them."""
    manifest = Manifest(
        step=step,
        world_size=len(reports),
        versions={"mm": mm.__version__, "torch": torch.__version__},
        scalars=json.loads(json.dumps(scalars, allow_nan=False)),
        files={r["file"]: FileRecord(num_bytes=r["num_bytes"], sha256=r["sha256"]) for r in reports},
        tensors=_tensor_records(reports),
    )
    problem = coverage_problem(manifest.tensors)
    if problem:
        raise _uncovered(problem)
    require_visible(folder, manifest.files)
    if derived is not None:
        derived.write(folder, manifest)
    fault.point("save.derived_written")
    write_new(folder / MANIFEST_NAME, manifest.model_dump_json())


def _tensor_records(reports: Sequence[dict[str, Any]]) -> dict[str, TensorRecord]:
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    pieces: dict[str, list[PieceRecord]] = {}
    for report in reports:
        for key, dtype, shape, name, offsets, sizes in report["pieces"]:
            kind = (dtype, tuple(shape))
            if kinds.setdefault(key, kind) != kind:
                raise _uncovered(f"{key} is {kinds[key]} on one rank and {kind} on another")
            record = PieceRecord(file=report["file"], name=name, offsets=tuple(offsets), sizes=tuple(sizes))
            pieces.setdefault(key, []).append(record)
    return {
        key: TensorRecord.model_validate({"dtype": kinds[key][0], "shape": kinds[key][1], "pieces": tuple(parts)})
        for key, parts in sorted(pieces.items())
    }


def _differences(manifest: Manifest, wanted: Sequence[Piece]) -> dict[str, list[str]]:
    missing, different = [], []
    for piece in wanted:
        record = manifest.tensors.get(piece.key)
        if record is None:
            missing.append(piece.key)
            continue
        dtype = record.dtype if piece.any_dtype else DTYPE_NAMES.get(piece.tensor.dtype, str(piece.tensor.dtype))
        if (record.shape, record.dtype) != (piece.global_shape, dtype):
            different.append(
                f"{piece.key} is {record.dtype} {list(record.shape)} there, {dtype} {list(piece.global_shape)} here"
            )
    return {"keys": sorted({piece.key for piece in wanted}), "missing": missing, "different": different}


def _read(path: Path, manifest: Manifest, wanted: Sequence[Piece]) -> None:
    """Copy every intersection of a stored box with a wanted one; each file is opened once."""
    copies: dict[str, list[tuple[PieceRecord, Piece, Box]]] = {}
    for piece in wanted:
        for record in manifest.tensors[piece.key].pieces:
            common = intersect(record.box, piece.box)
            if common is not None:
                copies.setdefault(record.file, []).append((record, piece, common))
    for file, parts in sorted(copies.items()):
        try:
            with safe_open(path / file, framework="pt", device="cpu") as shard, torch.no_grad():
                for record, piece, common in parts:
                    source = shard.get_slice(record.name)
                    if (source.get_dtype(), tuple(source.get_shape())) != (
                        manifest.tensors[piece.key].dtype,
                        record.sizes,
                    ):
                        raise SafetensorError(f"{record.name} is not what the manifest says")
                    index = common.within(record.box).slices
                    data = source[index] if index else shard.get_tensor(record.name)
                    piece.tensor[common.within(piece.box).slices].copy_(data)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "CKPT-012", f"{path / file} cannot be read: {error}.", "Use another checkpoint of the same run."
            ) from None


def _uncovered(problem: str) -> CheckpointError:
    return CheckpointError(
        "CKPT-014",
        f"The pieces to save do not add up: {problem}.",
        "Nothing was written; this is a defect of the program or its parallel layout, please report it.",
    )
