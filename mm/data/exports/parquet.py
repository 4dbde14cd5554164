"""Parquet: a file for each shard with its samples, or one for all that lists them.

Columns of both: `index` int64, `sample`, `caption`, `path`, `size`, `task` and `video` string, `draw` (which of the
sample's it is, from 0), `start_frame`, `num_frames` and `text_tokens` int32, `latent_shape` list of int32, `taken`
string (JSON; null where no shape rule chose). A list has `shard` int32, `offset` and `length` int64 beside them, the
place of the sample in the store. A file of samples has three columns for each tensor NAME (latents, prompt, prompt_mask
and those of the task): NAME binary, its elements in their order, little-endian; `NAME_shape` list of int32;
`NAME_dtype` string as safetensors spells it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.data.exports.samples import ListedSample

SUFFIX = ".parquet"
_ROW_GROUP_BYTES = 64 * 2**20
_ROW_GROUP_ROWS = 10_000
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}


def write_samples(path: Path, samples: Iterable[ListedSample], recipe_key: str, names: Sequence[str]) -> None:
    """Write samples with their tensors; a row group ends with the sample that makes it 64 MiB.

    Args:
        path: the file. samples: of a shard. recipe_key: of the store. names: of the tensors that each has.

    Raises:
        OSError: the disk refuses. DataError: what reading a sample raises.
    """

    def rows() -> Iterator[tuple[dict[str, Any], int]]:
        for sample in samples:
            _, tensors = sample.read(recipe_key)
            row = _row(sample)
            for name in names:
                row |= _columns(name, tensors[name])
            yield row, sum(tensor.nbytes for tensor in tensors.values())

    _write(path, _schema([*_ROW, *(entry for name in names for entry in _schema_of(name))]), rows(), "none")


def write_listing(path: Path, samples: Iterable[ListedSample]) -> None:
    """Write a list of samples; raises what `write_samples` raises."""
    rows = ((_row(sample) | _place(sample), 0) for sample in samples)
    _write(path, _schema([*_ROW, ("shard", "int32"), ("offset", "int64"), ("length", "int64")]), rows, "zstd")


_ROW = [
    ("index", "int64"),
    *((name, "string") for name in ("sample", "caption", "path", "size", "task", "video", "taken")),
    *((name, "int32") for name in ("draw", "start_frame", "num_frames", "text_tokens")),
    ("latent_shape", "list"),
]


def _row(sample: ListedSample) -> dict[str, Any]:
    said = sample.row
    taken = said.get("taken")
    return {
        "index": sample.index,
        "sample": said["sample"],
        "caption": said["cap"],
        "path": said["path"],
        "size": said["sample_size"],
        "task": said["task"],
        "video": said.get("video"),
        "taken": None if taken is None else json.dumps(taken, ensure_ascii=False),
        "draw": sample.draw,
        "start_frame": said["start_frame_idx"],
        "num_frames": said["sample_num_frames"],
        "text_tokens": said["text_tokens"],
        "latent_shape": said["latent_shape"],
    }


def _place(sample: ListedSample) -> dict[str, Any]:
    blob = sample.blobs[0]
    return {"shard": sample.shard, "offset": blob.offset, "length": blob.length}


def _columns(name: str, tensor: Tensor) -> dict[str, Any]:
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return {name: content, f"{name}_shape": list(tensor.shape), f"{name}_dtype": _DTYPES[tensor.dtype]}


def _schema_of(name: str) -> list[tuple[str, str]]:
    return [(name, "binary"), (f"{name}_shape", "list"), (f"{name}_dtype", "string")]


def _schema(columns: Sequence[tuple[str, str]]) -> Any:
    import pyarrow

    kinds = {
        "string": pyarrow.string(),
        "binary": pyarrow.binary(),
        "int32": pyarrow.int32(),
        "int64": pyarrow.int64(),
        "list": pyarrow.list_(pyarrow.int32()),
    }
    return pyarrow.schema([(name, kinds[kind]) for name, kind in columns])


def _write(path: Path, schema: Any, rows: Iterable[tuple[dict[str, Any], int]], compression: str) -> None:
    """Write rows, each with its size in bytes, in row groups."""
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetWriter(path, schema, compression=compression) as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for row, num_bytes in rows:
            group.append(row)
            size += num_bytes
            if size >= _ROW_GROUP_BYTES or len(group) >= _ROW_GROUP_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(group, schema))
                group, size = [], 0
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
