"""What a finished store of shards says of itself, for tests."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from mm.data.recipe import load_recipe
from mm.data.store.blobs import read_blob
from mm.data.store.opened import open_shards


def listed(store: Path) -> list[dict[str, Any]]:
    """The rows of all shards, in order."""
    files = sorted((store / "shards").glob("[0-9]*/listing.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def is_finished(store: Path) -> bool:
    """Tell whether a store may be trained on."""
    return (store / "manifest.json").exists()


def stored(store: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of every sample by its id, its caption's among them."""
    opened = open_shards(store, load_recipe(store).key)
    found = {}
    for row in range(len(opened)):
        sample, prompt = (load(read_blob(blob, "")) for blob in opened.blobs_of(row))
        found[opened.name(row)] = {**sample, **prompt}
    return found


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its path there."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def shards_of(store: Path) -> dict[str, bytes]:
    """Every file of the shards."""
    return {name: value for name, value in content(store).items() if name.startswith("shards/")}
