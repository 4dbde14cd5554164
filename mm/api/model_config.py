"""Place of a model's files, as people who script DiffSynth-Studio's pipelines say it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mm.checkpoint.hub import download
from mm.config.model_files import ModelFiles
from mm.errors import ConfigError

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
