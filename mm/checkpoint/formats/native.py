"""Writing the original Wan's format: safetensors in native names, and a config.json in the official fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mm.checkpoint.files import write_new
from mm.checkpoint.formats.shard_files import write_shards
from mm.checkpoint.safetensor_file import Entry
from mm.config.model import WanConfig
from mm.wan.config_json import wan_config_to_original


def write_native(folder: Path, entries: Sequence[Entry], config: WanConfig, max_bytes: int | None = None) -> None:
    """Write the weights (native names) and the configuration into an empty folder, forced to disk.

    Args:
        folder: exists and is empty. entries: the tensors. config: the model's shape.
        max_bytes: of a shard; None writes one file, as the original is published.
    """
    write_shards(folder, entries, max_bytes or sum(entry.num_bytes for entry in entries))
    write_new(folder / "config.json", json.dumps(wan_config_to_original(config), indent=2) + "\n")
