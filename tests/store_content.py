"""What a finished store of shards says of itself, for tests."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from mm.data.features import (
    EMPTY_PROMPT,
    EMPTY_PROMPT_ID,
    FEATURES,
    LISTING,
    Feature,
    Origin,
    feature_name,
    parse_header,
    text_hash,
    write_feature,
)
from mm.data.listing import FeatureRow
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
        sample, prompt = (load(bytes(read_blob(blob, ""))) for blob in opened.blobs_of(row))
        found[opened.name(row)] = {**sample, **prompt}
    return found


def as_files(store: Path) -> Path:
    """Make a store of one file a sample, as earlier versions wrote it, of a store of shards, in its place."""
    recipe = load_recipe(store)
    opened = open_shards(store, recipe.key)
    (store / FEATURES).mkdir()
    for row, values in enumerate(listed(store)):
        sample, prompt = (bytes(read_blob(blob, "")) for blob in opened.blobs_of(row))
        header, tensors = parse_header(io.BytesIO(sample), len(sample)), load(sample)
        feature = Feature(tensors.pop("latents"), load(prompt)["prompt"], header.start_frame, tensors, header.taken)
        values["file"] = f"{FEATURES}/{feature_name(values['sample'])}"
        write_feature(store / values["file"], feature, header.origin, recipe.max_text_tokens)
        with (store / LISTING).open("ab") as listing:
            listing.write(FeatureRow.model_validate_json(json.dumps(values)).line())
    empty = opened.empty_prompt()
    assert empty is not None
    prompt = Feature(None, load(bytes(read_blob(empty, "")))["prompt"])
    origin = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    write_feature(store / FEATURES / EMPTY_PROMPT, prompt, origin, recipe.max_text_tokens)
    for path in store.iterdir():
        if path.name in ("shards", "plan"):
            shutil.rmtree(path)
        elif path.name.startswith(("catalog-", "manifest")):
            path.unlink()
    return store


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its path there."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def shards_of(store: Path) -> dict[str, bytes]:
    """Every file of the shards."""
    return {name: value for name, value in content(store).items() if name.startswith("shards/")}
