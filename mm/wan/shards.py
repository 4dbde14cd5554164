"""Finding the safetensors files of a weight folder and checking their headers, before any tensor is read.

Format: https://github.com/huggingface/safetensors (8 bytes little-endian header size, JSON header, tensor bytes
without holes) and Hugging Face's `<name>.safetensors.index.json` with `weight_map`: tensor name to shard.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mm.config.base import load_json
from mm.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
_MAX_HEADER = 100_000_000  # the format's own limit, so that a damaged size field cannot ask for all memory
_BITS = {"C64": 64, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8, "F4": 4} | {
    **{f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)},
    **{f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")},
    **{f"F6_{kind}": 6 for kind in ("E2M3", "E3M2")},
}
"""Bits of an element in every dtype of the format; which of them are read is another question."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_LFS_POINTER = b"version "  # what a clone without Git LFS has in place of a file begins with
_COPY_AGAIN = "Copy or download the file again."


class TensorInfo(NamedTuple):
    """Entry of a header for one tensor; `dtype` in safetensors' spelling, for example BF16."""

    dtype: str
    shape: tuple[int, ...]


Header = Mapping[str, TensorInfo]
NothingThere = Literal["absent", "file", "pipeline", "folder"]
"""Why a path has no safetensors: it does not exist, is another file, the folder of a whole pipeline, or another one."""


def find_shards(path: Path) -> dict[Path, Header]:
    """The checked headers of the weight files at `path`.

    Args:
        path: one safetensors file, or a folder. In a folder an index decides; without one it is
            diffusion_pytorch_model.safetensors; without that all safetensors files together.

    Raises:
        DataError: DATA-020 nothing there; DATA-022 a damaged file; DATA-023 an unusable index; DATA-024 a shard is
            missing that the index names, or that the names of the others count; DATA-025 a shard that holds other
            tensors than the index says.
    """
    if path.is_file() and path.suffix == ".safetensors":
        if (match := _SHARD.fullmatch(path.name)) and int(match[3]) > 1:
            raise DataError("DATA-024", f"{path} is one of {int(match[3])} shards.", "Give the folder of all of them.")
        return {path: read_header(path)}
    files, indexes = _visible(path, "*.safetensors"), _visible(path, "*.safetensors.index.json")
    if len(indexes) > 1:
        raise _bad_index(path, f"there are {len(indexes)} index files, {', '.join(i.name for i in indexes)}")
    if indexes:
        return _indexed_shards(indexes[0], files)
    if path / DIFFUSERS_FILE in files:
        _report_unused(set(files) - {path / DIFFUSERS_FILE})
        files = [path / DIFFUSERS_FILE]
    if not files:
        raise no_weights(path, what_instead(path))
    require_all_shards(files)
    return {file: read_header(file) for file in files}


def is_shard(path: Path) -> bool:
    """Recognise by its name a file that is one of several that belong together."""
    return _SHARD.fullmatch(path.name) is not None


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Matching files, sorted; not `._model.safetensors`, which macOS puts beside files, nor what a killed copy left."""
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith(".")) if folder.is_dir() else []


def read_header(path: Path) -> Header:
    """Name, dtype and shape of every tensor in a safetensors file, checked against the file's size.

    Raises:
        DataError: DATA-022 when the file cannot be read, is truncated or longer than its header says, or when the
            header is larger than the file, not JSON, or describes tensors that overlap or leave holes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == _LFS_POINTER:
                raise DataError("DATA-022", f"{path} is a pointer of Git LFS, not the file.", "Fetch it: git lfs pull.")
            header_size = int.from_bytes(start, "little")
            if size < 8 or header_size > min(size - 8, _MAX_HEADER):
                raise _damaged(path, f"its header should have {header_size} bytes, the whole file has {size}")
            text = file.read(header_size)
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error})") from None
    try:
        content = json.loads(text)
        content.pop("__metadata__", None)
        entries = sorted(((*e["data_offsets"], name, e["dtype"], tuple(e["shape"])) for name, e in content.items()))
        end = _checked_end(entries)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its header is not a safetensors header ({type(error).__name__}: {error})") from None
    if end != size - 8 - header_size:
        raise _damaged(path, f"it has {size} bytes, its header describes {8 + header_size + end}")
    return {name: TensorInfo(dtype, shape) for _, _, name, dtype, shape in entries}


def _checked_end(entries: Iterable[tuple[Any, ...]]) -> int:
    """End of the last tensor; ValueError when the tensors do not follow each other or have impossible sizes."""
    position = 0
    for begin, end, name, dtype, shape in entries:
        if dtype not in _BITS:
            raise ValueError(f"tensor {name} has the unknown dtype {dtype}")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError(f"tensor {name} has the shape {shape}")
        if begin != position or end - begin != math.prod(shape) * _BITS[dtype] // 8:
            raise ValueError(
                f"tensor {name} lies at bytes {begin} to {end}, which does not fit its shape and neighbours"
            )
        position = end
    return position


def require_all_shards(files: Sequence[Path]) -> None:
    """Count shards by names such as x-00001-of-00003.safetensors, where no index says what belongs together.

    Raises:
        DataError: DATA-024 for those that are missing.
    """
    sets: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in sets.items():
        first = 0 if 0 in numbers else 1
        missing = [number for number in range(first, first + count) if number not in numbers]
        if missing:
            names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in missing[:10]]
            raise DataError(
                "DATA-024",
                f"{files[0].parent} lacks {len(missing)} of {count} shards: {', '.join(names)}"
                f"{', ...' if len(missing) > 10 else ''}.",
                "Copy the missing shards into the folder.",
            )


def _indexed_shards(index: Path, files: list[Path]) -> dict[Path, Header]:
    weight_map = _read_index(index)
    shards: dict[Path, Header] = {}
    for file_name in sorted(set(weight_map.values())):
        file = index.parent / file_name
        if not file.is_file():
            raise DataError(
                "DATA-024",
                f"{index} names the shard {file_name}, which is not in the folder.",
                "Copy the missing shard into the folder.",
            )
        shards[file] = read_header(file)
        expected = {name for name, shard in weight_map.items() if shard == file_name}
        if expected != set(shards[file]):
            absent, extra = expected - set(shards[file]), set(shards[file]) - expected
            raise DataError(
                "DATA-025",
                f"{file} does not hold what {index.name} says: {len(absent)} tensors absent {sorted(absent)[:10]}, "
                f"{len(extra)} not in the index {sorted(extra)[:10]}.",
                "Take the shards and the index from the same source.",
            )
    _report_unused(set(files) - set(shards))
    return shards


def _read_index(index: Path) -> dict[str, str]:
    try:
        content = load_json(index)
    except ConfigError as error:
        raise _bad_index(index, error.problems[0].message) from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad_index(index, 'it has no object "weight_map"')
    for name, shard in weight_map.items():
        # Only names inside the folder: an index from elsewhere must not make us read other files.
        is_name = isinstance(shard, str) and os.path.basename(shard) == shard and "\0" not in shard
        if not is_name or not shard.endswith(".safetensors"):
            raise _bad_index(index, f"the shard of {name} is {shard!r}, not the name of a safetensors file")
    return weight_map


def _report_unused(files: set[Path]) -> None:
    for file in sorted(files):
        logger.warning("%s is not part of the weights of this folder and is not read", file)


def what_instead(path: Path) -> NothingThere:
    """Description of a path where `find_shards` finds nothing."""
    if not path.exists():
        return "absent"
    if path.is_file():
        return "file"
    return "pipeline" if (path / "transformer").is_dir() else "folder"


def no_weights(path: Path, why: str) -> DataError:
    """The error DATA-020 about a path; `why` is a `NothingThere`, or what else is there."""
    if why == "absent":
        return DataError("DATA-020", f"Weights not found: {path} does not exist.", "Check the path.")
    if why == "file":
        return DataError("DATA-020", f"{path} is not a .safetensors file.", "Give a safetensors file or its folder.")
    if why == "pipeline":
        return DataError(
            "DATA-020",
            f"{path} holds no safetensors file itself; it is the folder of a whole pipeline.",
            f"Give {path / 'transformer'}.",
        )
    return DataError(
        "DATA-020",
        f"{path} holds no safetensors file.",
        "Give the folder with the transformer's *.safetensors; other formats are not read.",
    )


def _damaged(path: Path, what: str) -> DataError:
    return DataError("DATA-022", f"{path} is damaged: {what}.", _COPY_AGAIN)


def _bad_index(path: Path, what: str) -> DataError:
    return DataError("DATA-023", f"The index of {path} cannot be used: {what}.", "Take it from the weights' source.")
