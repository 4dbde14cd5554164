"""Weights from one format to another, and what is at a path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mm.checkpoint import convert
from mm.checkpoint.formats.source import WeightSource
from mm.config.layout import Stages
from mm.errors import ConfigError
from mm.lora import convert as lora
from mm.lora.inspection import Inspection, inspect

Format = Literal["hf", "native", "mm", "bf16", "peft", "comfyui", "mm-lora"]
"""Of a transformer or an encoder: `hf` (diffusers), `native`, `mm` (MindSpeed-MM's), `bf16` (a training checkpoint in
native names); of an adapter: `peft`, `comfyui`, `mm-lora`."""


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: the folder or file, and the files, relative to it where it is a folder."""

    path: Path
    files: tuple[str, ...]


def convert_weights(
    source: str | Path,
    target: str | Path,
    to: Format = "hf",
    *,
    adapter: str | Path | None = None,
    strength: float = 1.0,
    like: str | Path | None = None,
    stages: Stages | None = None,
    max_shard_bytes: int | None = None,
    averaged: bool = False,
) -> Converted:
    """Convert weights of any format as `mm convert` does; nothing that exists is overwritten.

    Args:
        source: a transformer's weights, one of Wan's encoders (`hf` and `native`), or an adapter.
        target: a new folder; a file for `peft` and `comfyui`.
        to: the format.
        adapter: of a transformer, is merged into it first (`hf` and `native`). strength: factor on it.
        like: to `hf`, the original folder whose file names, index, config.json and dtypes are kept.
        stages: to `mm`, [VP][PP] blocks of each pipeline stage; None writes one file.
        max_shard_bytes: to `hf` and `bf16`, most bytes of a shard.
        averaged: of a training checkpoint the average of its weights.

    Raises:
        ConfigError: CFG-200 for an argument without effect.
        CheckpointError, DataError: what `mm.checkpoint.convert` and `mm.lora.convert` raise.
    """
    here, there = Path(source), Path(target)
    if to not in get_args(Format):
        raise ConfigError("CFG-200", f'to="{to}" is no format.', f"Use one of {', '.join(get_args(Format))}.")
    _require_effect(
        to,
        {
            "adapter": (adapter is not None, ("hf", "native")),
            "strength": (strength != 1.0, ("hf", "native") if adapter is not None else ()),
            "like": (like is not None, ("hf",)),
            "stages": (stages is not None, ("mm",)),
            "max_shard_bytes": (max_shard_bytes is not None, ("hf", "bf16") if like is None else ("bf16",)),
        },
    )
    before = _files(there)
    original, size = None if like is None else Path(like), max_shard_bytes
    hf_size = size or convert.HF_SHARD_BYTES
    if adapter is not None:
        merged: WeightSource = lora.merged(here, Path(adapter), strength, averaged=averaged)
        if to == "hf":
            convert.write_as_hf(merged, there, original, hf_size)
        else:
            convert.write_as_native(merged, there)
        return Converted(there, tuple(sorted(_files(there) - before)))
    actions: dict[Format, Callable[[], None]] = {
        "hf": lambda: convert.convert_to_hf(here, there, original, hf_size, averaged=averaged),
        "native": lambda: convert.convert_to_native(here, there, averaged=averaged),
        "mm": lambda: convert.convert_to_mm(here, there, stages, averaged=averaged),
        "bf16": lambda: convert.zero_to_bf16(here, there, size or convert.BF16_SHARD_BYTES, averaged=averaged),
        "peft": lambda: lora.write_file(here, there, "peft", averaged=averaged),
        "comfyui": lambda: lora.write_file(here, there, "comfyui", averaged=averaged),
        "mm-lora": lambda: lora.lora_to_mm(here, there, averaged=averaged),
    }
    actions[to]()
    return Converted(there, tuple(sorted(_files(there) - before)))


def inspect_weights(path: str | Path) -> Inspection:
    """Look at what is at a path, without changing anything; of tensors only the headers are read.

    What cannot be used for a model is no error here: its `problems` say why.
    """
    return inspect(Path(path))[0]


def _require_effect(to: Format, given: dict[str, tuple[bool, tuple[Format, ...]]]) -> None:
    for name, (is_given, formats) in given.items():
        if is_given and to not in formats:
            raise ConfigError("CFG-200", f'{name} has no effect with to="{to}" here.', "Leave it out.")


def _files(path: Path) -> set[str]:
    if path.is_file():
        return {path.name}
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} if path.is_dir() else set()
