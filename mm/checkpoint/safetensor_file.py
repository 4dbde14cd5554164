"""Writing one safetensors file in one pass: streamed, hashed on the way, forced to disk.

The library's own `save_file` wants all tensors in memory and no hash comes out of it. The format is eight bytes of
header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}`, then the tensors' bytes without
gaps (https://huggingface.co/docs/safetensors, "Format"). As the library does, tensors are laid out widest element
first, so that each begins at a multiple of its element size. Reading is the library's.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from mm.checkpoint import fault
from mm.checkpoint.finite import require_finite
from mm.errors import CheckpointError

log = logging.getLogger(__name__)

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK_BYTES = 64 * 2**20
RETRIED_ERRORS = (errno.EIO, errno.ESTALE)  # what a network file system gives when it stumbles; a full disk is no such
NUM_ATTEMPTS = 3


@dataclass(frozen=True)
class Entry:
    """One tensor to write: `read` is called once, when its turn comes, so that one tensor at a time is in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """Facts of what was written: the size in bytes and the SHA-256 of the whole file."""

    num_bytes: int
    sha256: str


def entry_of(name: str, tensor: torch.Tensor) -> Entry:
    """An entry for a tensor that is in memory already."""
    return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_safetensors(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write `path`, which must not exist, and force it to disk. A stumbling network file system is tried three times.

    Args:
        path: the file.
        entries: the tensors, in any order.
        metadata: texts for the header; `{"format": "pt"}` is what diffusers and transformers ask for.

    Raises:
        CheckpointError: CKPT-016 for a value that is not finite, CKPT-017 for a dtype that the format has no name for;
            the partial file is removed.
        OSError: the file exists, the disk is full, ...; the partial file is removed.
    """
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return _write_once(path, entries, metadata or {})
        except OSError as error:
            if error.errno not in RETRIED_ERRORS or attempt == NUM_ATTEMPTS:
                raise
            log.warning("%s: %s; attempt %d of %d", path, error.strerror, attempt, NUM_ATTEMPTS)
            time.sleep(attempt)
    raise AssertionError("unreachable")


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's elements in C order as bytes; a copy only if it is not on the CPU or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return np.from_dlpack(flat).data  # memory that `Tensor.numpy` has shown is never given back (mm.optim.host_stay)


def _write_once(
    path: Path,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
) -> Written:
    ordered = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header = _header(ordered, metadata)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            digest = hashlib.sha256()
            num_bytes = _write(file, memoryview(header), digest)
            for position, entry in enumerate(ordered):
                if position == len(ordered) // 2:
                    fault.point("save.shard_half_written")
                num_bytes += _write_tensor(file, entry, digest)
            fault.point("save.shard_written")
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    fault.point("save.shard_durable")
    return Written(num_bytes, digest.hexdigest())


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                "CKPT-017",
                f"The tensor {entry.name} has the dtype {entry.dtype}, which is not stored.",
                f"Convert it to one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPE_NAMES)}.",
            )
        if entry.name in header:
            raise ValueError(f"two tensors are called {entry.name}")
        end = position + entry.num_bytes
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(
    file: io.FileIO,
    entry: Entry,
    digest: hashlib._Hash,
) -> int:
    tensor = entry.read()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(
            f"{entry.name} was announced as {entry.dtype} {entry.shape}, not {tensor.dtype} {tensor.shape}"
        )
    return _write(file, bytes_of(require_finite(entry.name, tensor)), digest)


def _write(file: io.FileIO, data: memoryview, digest: hashlib._Hash) -> int:
    """Write all of `data` (a raw file may take less at a time) and hash it while it is in the cache."""
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        digest.update(chunk)
        while len(chunk):
            chunk = chunk[file.write(chunk) :]
    return len(data)
