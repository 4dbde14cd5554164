"""Reading MindSpeed's layer-zero saves, of which every rank wrote its part of each parameter.

<root>/iter_0005000/model_0.pt, model_1.pt, ...   one file a rank; a tracker is not written

A file holds `model`, the rank's elements of every parameter as a vector; `shard_state_dict`, the whole shape of every
parameter that is cut; and `parallel_state`, the rank and the degrees. The elements of all ranks one after the other are
the parameter. Names begin with the attribute that holds the transformer, and contain those of the wrappers around it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.checkpoint.directory import TRACKER_NAME, step_of
from mm.checkpoint.formats.found import Found
from mm.checkpoint.formats.mindspeed import named_by_tracker
from mm.checkpoint.formats.pt_file import read_pt, unreadable
from mm.checkpoint.formats.source import TensorKind
from mm.config.model import WanConfig
from mm.errors import CheckpointError
from mm.wan.names import translate
from mm.wan.prefixes import unwrapped

log = logging.getLogger(__name__)

FILES = "model_[0-9]*.pt"
PREFIX = "predictor."
FORMAT = "a layer-zero save of MindSpeed"


class _ShardInfo:
    """Stands for MindSpeed's record of how a parameter is cut; only its `shape` is used."""

    shape: Any = None


_ALLOWED = ((_ShardInfo, "mindspeed.core.distributed.layerzero.state.fqn.ShardFlattenInfo"),)


@dataclass(frozen=True)
class LayerZeroWeights:
    """`WeightSource` over the files of all ranks, mapped.

    Attributes:
        path: the folder of the files. shards: of every parameter by native name, in the ranks' order.
        whole: kinds by native name.
    """

    path: Path
    shards: Mapping[str, tuple[Tensor, ...]]
    whole: Mapping[str, TensorKind]
    label: str = FORMAT

    @classmethod
    def open(cls, found: Found) -> LayerZeroWeights:
        """Open what `recognise` found.

        Raises:
            CheckpointError: CKPT-018 for tensor or pipeline parallelism, CKPT-021 for a file that is damaged or needs
                code to be read, CKPT-045 for files that do not belong together.
        """
        folder = found.path
        files = [folder / name for name in found.files]
        contents = [read_pt(file, _ALLOWED) for file in files]
        for rank, (file, content) in enumerate(zip(files, contents, strict=True)):
            _check(file, content, rank)
        if any("ema_model" in content for content in contents):
            log.info("%s also holds averaged weights (ema_model), which are not read.", folder)
        infos = {unwrapped(str(name)): info for name, info in contents[0]["shard_state_dict"].items()}
        states = [_state(file, content["model"]) for file, content in zip(files, contents, strict=True)]
        if any(state.keys() != states[0].keys() for state in states):
            raise _torn(folder, "the files name different parameters")
        shards: dict[str, tuple[Tensor, ...]] = {}
        whole: dict[str, TensorKind] = {}
        for name in states[0]:
            native = translate(name.removeprefix(PREFIX), "mm", "native") or name.removeprefix(PREFIX)
            if native in shards:
                raise _torn(folder, f"{name} is there with and without {PREFIX}")
            parts = tuple(state[name] for state in states)
            shards[native], whole[native] = _joined(folder, name, parts, infos.get(name))
        return cls(folder, shards, whole)

    def kinds(self) -> dict[str, TensorKind]:
        """Kinds of whole parameters."""
        return dict(self.whole)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of whole parameters."""
        return {name: kind.shape for name, kind in self.whole.items()}

    def read(self, name: str) -> Tensor:
        """Put together from the ranks' elements."""
        parts = self.shards[name]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(self.whole[name].shape)

    def config(self) -> WanConfig | None:
        """None: no configuration is part of the files."""
        return None


def recognise(path: Path) -> Found | None:
    """Such a save, or the latest of those in a folder.

    Raises:
        CheckpointError: CKPT-010 as `named_by_tracker`, CKPT-042 beside a Megatron checkpoint, CKPT-045 for files that
            are missing.
    """
    folder = _find(path)
    if folder is None:
        return None
    files = tuple(file.name for file in _files(folder))
    return Found(path, FORMAT, folder, "model", step=step_of(folder), files=files)


def _find(path: Path) -> Path | None:
    """The folder of the files: `path`, the one that a tracker names, or without a tracker the latest."""
    if any(path.glob(FILES)):
        return path
    if (path / TRACKER_NAME).is_file():
        named = named_by_tracker(path)
        return named if any(named.glob(FILES)) else None
    saves = {file.parent for file in path.glob(f"iter_*/{FILES}") if step_of(file.parent) is not None}
    return max(saves, default=None)


def _files(folder: Path) -> list[Path]:
    """The files of ranks 0, 1, ... without a hole."""
    count = sum(1 for _ in folder.glob(FILES))
    files = [folder / f"model_{rank}.pt" for rank in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise _torn(folder, f"it has {count} files model_<rank>.pt, and no {', '.join(missing[:10]) or 'model_0.pt'}")
    if any(folder.glob("mp_rank_*")):
        raise CheckpointError(
            "CKPT-042",
            f"{folder} holds files of several checkpoints: folders mp_rank_* and files model_*.pt.",
            "Keep one or the other.",
        )
    return files


def _check(file: Path, content: Mapping[str, Any], rank: int) -> None:
    """Check one file alone."""
    for key in ("model", "shard_state_dict", "parallel_state"):
        if not isinstance(content.get(key), dict):
            raise unreadable(file, f'it has no dictionary "{key}", as layer-zero writes it')
    state = content["parallel_state"]
    if state.get("global_rank") != rank:
        raise _torn(file.parent, f"{file.name} was written by rank {state.get('global_rank')}")
    if state.get("tp_degree", 1) != 1 or state.get("pp_degree", 1) != 1:
        raise CheckpointError(
            "CKPT-018",
            f"{file} was saved with tensor or pipeline parallelism (TP {state.get('tp_degree')}, "
            f"PP {state.get('pp_degree')}).",
            "Merge it with the tools of the program that wrote it.",
        )


def _state(file: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    found = {unwrapped(str(name)): value for name, value in state.items() if not str(name).endswith("_extra_state")}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise unreadable(file, f'"model" holds {type(value).__name__} under {name}, no tensor')
    return found


def _joined(folder: Path, name: str, parts: tuple[Tensor, ...], info: Any) -> tuple[tuple[Tensor, ...], TensorKind]:
    """The parts that make up a parameter, and what it is; without `info` every rank has the whole."""
    if info is None:
        return parts[:1], TensorKind(tuple(parts[0].shape), parts[0].dtype)
    shape = getattr(info, "shape", None)
    if not isinstance(shape, torch.Size):
        raise _torn(folder, f"shard_state_dict does not tell the shape of {name}")
    numel = sum(part.numel() for part in parts)
    if numel != math.prod(shape):
        raise _torn(folder, f"the {len(parts)} files hold {numel} elements of {name}, which is {list(shape)}")
    if len({part.dtype for part in parts}) > 1 or any(part.ndim != 1 for part in parts):
        raise _torn(folder, f"the parts of {name} are no vectors of one dtype")
    return parts, TensorKind(tuple(shape), parts[0].dtype)


def _torn(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        "CKPT-045",
        f"{folder} is not one complete layer-zero save: {what}.",
        "Copy the files model_<rank>.pt of all ranks of one save into it.",
    )
