"""Place of a model's files, as people who script DiffSynth-Studio's pipelines say it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from mm.checkpoint.hub import download
from mm.config.model_files import ModelFiles
from mm.device.backend import DeviceKind
from mm.errors import ConfigError, Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """Files of one model: by their paths, or by a released model's id and a pattern.

    Attributes:
        path: a file or folder, or the shards of one model.
        model_id: of a released model, `Wan-AI/Wan2.1-T2V-1.3B`. origin_file_pattern: of its files.
        offload_device: "cpu" where the weights wait in host memory until they are needed.
        offload_dtype: torch.float8_e4m3fn where they wait in 8 bits.
    """

    path: str | Path | Sequence[str | Path] | None = None
    model_id: str | None = None
    origin_file_pattern: str | None = None
    offload_device: str | torch.device | None = None
    offload_dtype: torch.dtype | None = None

    def resolve(self, folder: Path, *, may_download: bool = False, shared: bool = True) -> list[Path]:
        """Paths of the files, all of which exist.

        Args:
            folder: of models, where a model_id is looked for.
            may_download: fetch what is not there. shared: take files that many releases hold alike from another one.

        Raises:
            ConfigError: CFG-403 for a path that does not exist, or a config that names nothing, CFG-400 to CFG-402 for
                a released model.
        """
        if self.path is not None:
            paths = [Path(self.path)] if isinstance(self.path, (str, Path)) else [Path(one) for one in self.path]
            missing = [path for path in paths if not path.exists()]
            if missing or not paths:
                found = ", ".join(f"{path} does not exist" for path in missing) or "path is an empty list"
                raise ConfigError("CFG-403", f"ModelConfig: {found}.", "Correct the path.")
            return paths
        if self.model_id is None or self.origin_file_pattern is None:
            found = "ModelConfig has neither path nor model_id and origin_file_pattern."
            raise ConfigError("CFG-403", found, "Give path=, or both of the others.")
        files = ModelFiles(self.model_id, self.origin_file_pattern)
        try:
            found_here = files.find(folder, shared=shared)
        except ConfigError:
            if not may_download:
                raise
            return download(files, folder)
        if not files.present(folder):
            log.info("%s of %s: taking %s", files.pattern, files.model_id, found_here[0])
        return found_here


def device_of(word: str | torch.device) -> tuple[DeviceKind, int] | None:
    """The kind and the number of a device, `cuda:1`; None for a word that is none."""
    name, _, number = str(word).partition(":")
    kind = next((one for one in get_args(DeviceKind) if one == name), None)
    return None if kind is None or (number and not number.isdigit()) else (kind, int(number or 0))


def loading_problems(configs: Sequence[Any], device: Any, dtype: torch.dtype) -> Iterator[Problem]:
    """CFG-446 for what `WanVideoPipeline.from_pretrained` is given.

    Args:
        configs: of the models and the tokenizer. device: of the pipeline; None for the best. dtype: of its weights.
    """
    kinds = ", ".join(get_args(DeviceKind))
    if device is not None and device_of(device) is None:
        yield Problem("CFG-446", f"device is {device!r}.", f"Give one of {kinds}.")
    for config in configs:
        if not isinstance(config, ModelConfig):
            yield Problem("CFG-446", f"{config!r:.60} is given for a ModelConfig.", "Give ModelConfig(...).")
            continue
        word, place = f"ModelConfig of {config.path or config.model_id}", config.offload_device
        if place is not None and device_of(place) is None:
            found = f"{word}: offload_device is {place!r}."
            yield Problem("CFG-446", found, 'Give "cpu", or leave it out; mm.Residency has weights wait in files.')
        if config.offload_dtype not in (None, dtype, torch.float8_e4m3fn):
            found = f"{word}: offload_dtype is {config.offload_dtype!r}."
            yield Problem("CFG-446", found, "Give torch.float8_e4m3fn, or leave it out.")
