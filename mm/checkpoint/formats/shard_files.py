"""Writing safetensors shards and their index under the names that diffusers and transformers read."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from mm.checkpoint.files import write_new
from mm.checkpoint.safetensor_file import Entry, write_safetensors
from mm.wan.shards import DIFFUSERS_FILE

log = logging.getLogger(__name__)


def write_shards(folder: Path, entries: Sequence[Entry], max_bytes: int, file: str = DIFFUSERS_FILE) -> None:
    """Write tensors into an empty folder in shards of at most `max_bytes`, forced to disk.

    One shard is called `file` and has no index, as diffusers writes it. A tensor larger than a shard gets one of its
    own.
    """
    shards = _split(entries, max_bytes)
    stem, suffix = file.removesuffix(".safetensors"), "safetensors"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = file if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write_safetensors(folder / name, shard, {"format": "pt"})
        log.info("Wrote %s.", name)
        weight_map |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        total = sum(entry.num_bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_new(folder / f"{file}.index.json", json.dumps(index, indent=2) + "\n")


def _split(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Fill shard after shard in the order of the entries."""
    shards: list[list[Entry]] = [[]]
    num_bytes = 0
    for entry in entries:
        if shards[-1] and num_bytes + entry.num_bytes > max_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(entry)
        num_bytes += entry.num_bytes
    return shards
