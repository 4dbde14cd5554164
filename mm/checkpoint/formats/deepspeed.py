"""DeepSpeed's checkpoints, whose files are pickles of its classes: known, and refused with what to do instead."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import NoReturn

from mm.checkpoint.formats.found import Found
from mm.errors import CheckpointError

FORMAT = "a checkpoint of DeepSpeed"
_FILES = ("*zero_pp_rank_*_optim_states.pt", "*_model_states.pt", "*/*_optim_states.pt", "*/*_model_states.pt")
"""In the folder of a step or in the one that its file `latest` names."""
_TRANSFORMER = "transformer"


def recognise(path: Path) -> Found | None:
    """A folder of DeepSpeed's without safetensors beside its files, which would be used."""
    file = next(chain.from_iterable(path.glob(pattern) for pattern in _FILES), None)
    if file is None or any(path.glob("*.safetensors")):
        return None
    others = (_TRANSFORMER,) if (path / _TRANSFORMER).is_dir() else ()
    return Found(path, FORMAT, path, files=(str(file.relative_to(path)), *others))


def refuse(found: Found) -> NoReturn:
    """Say what to do with it.

    Raises:
        CheckpointError: CKPT-047.
    """
    remedy = (
        f"Give {found.path / _TRANSFORMER}, which has the same weights."
        if _TRANSFORMER in found.files
        else "If you trust it, run the zero_to_fp32.py that DeepSpeed put into it, with --safe_serialization, where "
        "DeepSpeed is installed; its safetensors are read here."
    )
    raise CheckpointError(
        "CKPT-047",
        f"{found.path} is a checkpoint of DeepSpeed ({found.files[0]}), whose files are pickles that need its code "
        "to be read; untrusted ones can run any.",
        remedy,
    )
