"""Writing diffusers' format: shards, their index and config.json, after a given folder or from nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from mm.checkpoint.files import copy_file, write_new
from mm.checkpoint.finite import rounded
from mm.checkpoint.formats.shard_files import write_shards
from mm.checkpoint.formats.source import WeightSource
from mm.checkpoint.mismatch import raise_on_mismatch
from mm.checkpoint.safetensor_file import DTYPES, Entry, write_safetensors
from mm.config.model import WanConfig
from mm.errors import CheckpointError
from mm.wan.config_json import wan_config_to_diffusers
from mm.wan.folder import StoredTensor, WeightFolder
from mm.wan.names import native_to_diffusers

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
MAX_SHARD_BYTES = 10 * 10**9  # diffusers' own default


def write_like(folder: Path, source: WeightSource, original: WeightFolder, expected: Mapping[str, object]) -> None:
    """Write the weights of `source` with the file names, index, config.json, tensor names and dtypes of `original`.

    Tensors of `original` that the model does not have are copied from it.

    Args:
        folder: exists and is empty.
        source: checked to hold exactly the tensors of `expected`.
        original: a diffusers folder.
        expected: the model's tensors by native name.

    Raises:
        CheckpointError: CKPT-011 when `original` lacks tensors of the model or has other shapes, CKPT-022 when it is
            no diffusers folder.
    """
    _require_diffusers(original)
    kinds = source.kinds()
    different = [
        f"{name} is {list(kinds[name].shape)} in the source, {list(entry.shape)} there"
        for name, entry in original.stored.items()
        if name in expected and entry.shape != kinds[name].shape
    ]
    raise_on_mismatch(str(original.path), sorted(expected.keys() - original.stored.keys()), [], different)
    for shard in original.shards:
        entries = []
        for name, stored in original.stored.items():
            if stored.file != shard:
                continue
            if name not in expected:
                log.info("%s is not part of the model and is copied from %s.", stored.name, shard)
            read = partial(_cast, source, name, stored) if name in expected else partial(original.tensor, name)
            entries.append(Entry(stored.name, DTYPES[stored.dtype], stored.shape, read))
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata()
        write_safetensors(folder / shard.name, entries, metadata)
        log.info("Wrote %s.", shard.name)
    for extra in (*sorted(original.path.glob("*.safetensors.index.json")), original.path / CONFIG_NAME):
        copy_file(extra, folder / extra.name)


def write_new_folder(folder: Path, entries: Sequence[Entry], config: WanConfig, max_bytes: int) -> None:
    """Write the weights (native names) into an empty folder in shards of at most `max_bytes`, and a config.json."""
    write_shards(folder, [replace(entry, name=native_to_diffusers(entry.name)) for entry in entries], max_bytes)
    write_new(folder / CONFIG_NAME, json.dumps(wan_config_to_diffusers(config), indent=2) + "\n")


def _cast(source: WeightSource, name: str, stored: StoredTensor) -> Tensor:
    """The source's tensor in the original's dtype: the fp32 master rounded to bf16 where the original is bf16."""
    return rounded(stored.name, source.read(name), DTYPES[stored.dtype])


def _require_diffusers(original: WeightFolder) -> None:
    problem = None
    if not original.path.is_dir() or not (original.path / CONFIG_NAME).is_file():
        problem = "it is not a folder with a config.json"
    elif original.convention != "diffusers" or original.prefix:
        problem = f"its tensors have {original.prefix}{original.convention} names"
    elif original.scales:
        problem = "its weights are quantised, with scales beside them"
    if problem:
        raise CheckpointError(
            "CKPT-022",
            f"--ckpt_path {original.path} is not a Hugging Face transformer folder: {problem}.",
            "Give the transformer folder of the Wan2.1 diffusers weights.",
        )
