"""manifest.json: what a training checkpoint holds. A folder with a valid one, and the files it names, is complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError

from mm.checkpoint.boxes import Box, covers_exactly_once
from mm.config.base import Section, load_json
from mm.errors import CheckpointError, MMError

MANIFEST_NAME = "manifest.json"
# Names from a manifest are opened as files, so they are bound to what the store itself writes.
ShardName = Annotated[str, StringConstraints(pattern=r"^shard-\d{5}-of-\d{5}\.safetensors$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]


class FileRecord(Section):
    """One shard file: its size in bytes and the SHA-256 of all of it."""

    num_bytes: Size
    sha256: Sha256


class PieceRecord(Section):
    """Place of one box of a tensor: the shard file, the tensor's name in it, and the box."""

    file: ShardName
    name: str
    offsets: tuple[Size, ...]
    sizes: tuple[Size, ...]

    @property
    def box(self) -> Box:
        """The box in the global tensor."""
        return Box(self.offsets, self.sizes)


class TensorRecord(Section):
    """One global tensor: safetensors' name of its dtype, its shape, and the pieces that make it up."""

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[Size, ...]
    pieces: tuple[PieceRecord, ...]


class Manifest(Section):
    """A training checkpoint.

    Attributes:
        format, schema_version: what the file is; another version is refused by its number.
        step: optimizer steps taken.
        world_size: ranks that saved; nothing about loading depends on it.
        versions: of this package and of torch, for the reader of a report.
        scalars: the state that is no tensor, as the trainer gave it.
        files: by name; tensors: by key.
    """

    format: Literal["mm-training-checkpoint"] = "mm-training-checkpoint"
    schema_version: Literal[1] = 1
    step: Size
    world_size: Annotated[int, Field(ge=1)]
    versions: dict[str, str]
    scalars: dict[str, Any]
    files: dict[ShardName, FileRecord]
    tensors: dict[str, TensorRecord]


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint folder `path` (`<root>/iter_0001000`) and check that it is complete.

    Every tensor must be covered exactly once, and every file it names must be there with its size.

    Raises:
        CheckpointError: CKPT-012 for a manifest that is missing, damaged or of another version, or a file that is
            missing or of another size.
    """
    try:
        manifest = Manifest.model_validate_json(json.dumps(load_json(path / MANIFEST_NAME)), strict=True)
    except MMError as error:
        raise damaged(path, error.problems[0].message) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(path, f'{MANIFEST_NAME}: "{where}": {first["msg"]}') from None
    for problem in (_tensor_problem(manifest), file_problem(path, manifest.files)):
        if problem:
            raise damaged(path, problem)
    return manifest


def coverage_problem(tensors: dict[str, TensorRecord]) -> str | None:
    """The first tensor whose pieces do not cover it exactly once, or None."""
    for key, record in tensors.items():
        problem = covers_exactly_once(record.shape, [piece.box for piece in record.pieces])
        if problem:
            return f"{key}: {problem}"
    return None


def _tensor_problem(manifest: Manifest) -> str | None:
    for key, record in manifest.tensors.items():
        for piece in record.pieces:
            if piece.file not in manifest.files:
                return f"{key} is said to be in {piece.file}, which the manifest does not list"
    return coverage_problem(manifest.tensors)


def file_problem(path: Path, files: Mapping[str, FileRecord]) -> str | None:
    """The first of a checkpoint's files that is not there with its size, or None."""
    for name, record in files.items():
        try:
            num_bytes = (path / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if num_bytes != record.num_bytes:
            return f"{name} has {num_bytes} bytes instead of {record.num_bytes}"
    return None


def damaged(path: Path, what: str) -> CheckpointError:
    """The error CKPT-012 about a checkpoint folder."""
    return CheckpointError(
        "CKPT-012",
        f"The checkpoint {path} is not complete: {what.rstrip('.')}.",
        "Use another checkpoint of the same run; this one cannot be repaired.",
    )
