"""Download of released files from Hugging Face's hub, or a mirror that HF_ENDPOINT names, into a folder of models."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mm.config.model_files import ModelFiles
from mm.errors import ConfigError
from mm.wan.component import first_line

log = logging.getLogger(__name__)

_OWNERS = {"PAI": "alibaba-pai", "iic": "ali-vilab"}
"""Owners that are called otherwise there than on ModelScope, whose names are in guides."""


def download(files: ModelFiles, folder: Path) -> list[Path]:
    """Fetch files that are not there, with the hub's progress bars. What is fetched in part is gone on with next time.

    Args:
        files: which. folder: of models.

    Returns:
        Those that match.

    Raises:
        ConfigError: CFG-402 where the hub cannot be reached, or has no such model; CFG-401 where nothing there matches.
    """
    from huggingface_hub import snapshot_download  # only where something is fetched

    owner, _, name = files.model_id.partition("/")
    repository = f"{_OWNERS.get(owner, owner)}/{name}"
    home = files.home(folder)
    log.info("%s: fetching %s of %s", home, files.pattern, repository)
    try:
        snapshot_download(repository, allow_patterns=[files.pattern, f"{files.pattern}/*"], local_dir=str(home))
    except Exception as error:  # the library, its transport and the system raise errors of unrelated types
        raise ConfigError(
            "CFG-402",
            f"{repository} cannot be fetched from {_place()} ({first_line(error)}).",
            f"Put its files into {home} yourself, or name a mirror in HF_ENDPOINT.",
        ) from None
    found = files.present(folder)
    if not found:
        # Where the hub cannot be reached, the library is content with a folder that is there.
        missing = f"{files.pattern} matches nothing in {home}, nor in what {_place()} gave of {repository}."
        raise ConfigError("CFG-401", missing, f"Correct the pattern; or see that {_place()} can be reached.")
    return found


def _place() -> str:
    """Address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
