"""MindSpeed-MM's format, for one process: what Megatron reads and writes for tensor and pipeline size 1.

<root>/latest_checkpointed_iteration.txt     "release" or the step, without a line end
<root>/release/  or  <root>/iter_0005000/
    mp_rank_00/model_optim_rng.pt            {"model": flat state dict in MM names, "checkpoint_version": 3.0}
    mm_config.json                           ours, and ignored by MindSpeed-MM: the model's shape
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.directory import TRACKER_NAME, folder_name
from mm.checkpoint.files import write_new
from mm.checkpoint.formats.source import TensorKind
from mm.config.base import load
from mm.config.model import WanConfig
from mm.errors import CheckpointError, ConfigError
from mm.wan.names import native_to_mm, translate

log = logging.getLogger(__name__)

RELEASE = "release"
RANK_FILE = Path("mp_rank_00", "model_optim_rng.pt")
CONFIG_NAME = "mm_config.json"
CHECKPOINT_VERSION = 3.0


@dataclass(frozen=True)
class MMWeights:
    """`WeightSource` over one `model_optim_rng.pt`, mapped into memory."""

    path: Path
    tensors: Mapping[str, Tensor]
    label: str = "MM weights"

    @classmethod
    def open(cls, path: Path) -> MMWeights:
        """Open `path`, the folder with the tracker or the `release`/`iter_*` folder below it.

        Raises:
            CheckpointError: CKPT-010 when the tracker names nothing, CKPT-018 for a layout of several processes,
                CKPT-021 for a file that is damaged or needs code to be read.
        """
        folder = _named_by_tracker(path) if (path / TRACKER_NAME).exists() else path
        _require_one_process(folder)
        state = _read_state(folder / RANK_FILE)
        tensors: dict[str, Tensor] = {}
        for name, value in state.items():
            if name.endswith("_extra_state"):  # Transformer layers of Megatron leave these; they hold no weights
                continue
            if not isinstance(value, Tensor):
                raise _unreadable(folder / RANK_FILE, f'"model" holds {type(value).__name__} under {name}, no tensor')
            tensors[translate(name, "mm", "native") or name] = value
        return cls(folder, tensors)

    def kinds(self) -> dict[str, TensorKind]:
        """From the mapped tensors."""
        return {name: TensorKind(tuple(value.shape), value.dtype) for name, value in self.tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """From the mapped tensors."""
        return {name: tuple(value.shape) for name, value in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self.tensors[name]

    def config(self) -> WanConfig | None:
        """From mm_config.json, which MindSpeed-MM itself does not write.

        Raises:
            CheckpointError: CKPT-021 when it is there and cannot be used.
        """
        file = self.path / CONFIG_NAME
        if not file.exists():
            return None
        try:
            return load(WanConfig, file)
        except ConfigError as error:
            raise _unreadable(file, error.problems[0].message) from None


def is_mm_folder(path: Path) -> bool:
    """Whether `path` is a folder with Megatron's tracker, or a `release`/`iter_*` folder below one."""
    return (path / TRACKER_NAME).is_file() or any(path.glob("mp_rank_*")) or any(path.glob("model_[0-9]*.pt"))


def write_release(folder: Path, state: Mapping[str, Tensor], config: WanConfig | None) -> None:
    """Write the contents of a `release` folder and force them to disk.

    Args:
        folder: exists and is empty.
        state: the weights by native name, as they are to be stored.
        config: the model's shape, where it is known.
    """
    file = folder / RANK_FILE
    file.parent.mkdir()
    renamed = {native_to_mm(name): value for name, value in state.items()}
    with file.open("xb") as writer:
        torch.save({"model": renamed, "checkpoint_version": CHECKPOINT_VERSION}, writer)
        writer.flush()
        os.fsync(writer.fileno())
    if config is not None:
        write_new(folder / CONFIG_NAME, config.model_dump_json(indent=2) + "\n")


def _named_by_tracker(root: Path) -> Path:
    text = (root / TRACKER_NAME).read_text(encoding="utf-8", errors="replace").strip()
    name = RELEASE if text == RELEASE else folder_name(int(text)) if re.fullmatch(r"\d{1,7}", text) else None
    if name is None or not (root / name).is_dir():
        raise CheckpointError(
            "CKPT-010",
            f'{root / TRACKER_NAME} holds "{text[:40]}", and there is no folder {name or "of that name"}.',
            'Write "release" or the step of an existing iter_* folder into it.',
        )
    return root / name


def _require_one_process(folder: Path) -> None:
    ranks = sorted(entry.name for entry in folder.glob("mp_rank_*"))
    if ranks == [RANK_FILE.parts[0]] and (folder / RANK_FILE).is_file():
        return
    if ranks or any(folder.glob("model_[0-9]*.pt")):
        found = ", ".join(ranks) or "model_*.pt of layer-zero"
        raise CheckpointError(
            "CKPT-018",
            f"{folder} was saved by several processes ({found}); this version reads {RANK_FILE} alone.",
            "Merge it with the tools of the program that wrote it.",
        )
    raise CheckpointError("CKPT-010", f"{folder} has no {RANK_FILE}.", "Check the path.")


def _read_state(file: Path) -> dict[str, Any]:
    """The flat state dict, mapped: pages are read when a tensor is used. Nothing in the file is executed."""
    try:
        # A training save carries Megatron's parsed arguments: a Namespace of plain values, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what torch raises for a refused or damaged file has no common base
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _unreadable(file, f"it is damaged or holds more than tensors and plain values ({first_line})") from None
    state = content.get("model") if isinstance(content, dict) else None
    if isinstance(content, dict) and any(re.fullmatch(r"model\d+", str(key)) for key in content):
        raise CheckpointError(
            "CKPT-018",
            f"{file} holds a virtual pipeline (model0, model1, ...), which this version does not read.",
            "Merge it with the tools of the program that wrote it.",
        )
    if not isinstance(state, dict):
        raise _unreadable(file, 'it has no state dict under "model"')
    return {str(name): value for name, value in state.items()}


def _unreadable(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        "CKPT-021",
        f"{file} cannot be used: {what.rstrip('.')}.",
        "Copy it again, or save it again with weights alone (--no-save-optim --no-save-rng).",
    )
