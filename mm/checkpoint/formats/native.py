"""Writing the original Wan's format: one safetensors file in native names, and a config.json in the official fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mm.checkpoint.files import write_new
from mm.checkpoint.safetensor_file import Entry, write_safetensors
from mm.config.model import WanConfig
from mm.wan.config_json import wan_config_to_original
from mm.wan.shards import DIFFUSERS_FILE


def write_native(folder: Path, entries: Sequence[Entry], config: WanConfig) -> None:
    """Write the weights (native names) and the configuration into an empty folder, forced to disk."""
    write_safetensors(folder / DIFFUSERS_FILE, entries, {"format": "pt"})
    write_new(folder / "config.json", json.dumps(wan_config_to_original(config), indent=2) + "\n")
