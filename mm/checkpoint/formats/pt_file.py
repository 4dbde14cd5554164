"""Files that `torch.save` wrote, read without running anything that is in them, and written in one go.

Such a file is a pickle. `torch.load(weights_only=True)` builds tensors and plain containers, and the classes that are
allowed by name here, which hold values and run no code; it refuses everything else.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mm.checkpoint.finite import require_finite
from mm.errors import CheckpointError

SUFFIXES = (".pth", ".pt", ".bin")
"""Of such files, by custom."""
Allowed = tuple[Callable[..., Any], str]
"""A class of ours, and the name in a file that it stands for."""


def read_pt(file: Path, allowed: tuple[Allowed, ...] = ()) -> dict[str, Any]:
    """The dictionary in a file, its tensors mapped: pages are read when a tensor is used.

    Args:
        file: written by `torch.save` in its zip format.
        allowed: classes of the writing program that carry values alone.

    Raises:
        CheckpointError: CKPT-021 for a file that is damaged, needs code to be read, or holds no dictionary.
    """
    try:
        # A training save carries Megatron's parsed arguments: a Namespace of plain values, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # what torch raises for a refused or damaged file has no common base
        refused = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
        if refused:
            raise unreadable(file, f"it needs {refused[1]}, which could run code") from None
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise unreadable(file, f"it is damaged or holds more than tensors and plain values ({first_line})") from None
    if not isinstance(content, dict):
        raise unreadable(file, f"it holds a {type(content).__name__}, not a dictionary")
    return {str(key): value for key, value in content.items()}


def write_pt(file: Path, content: Mapping[str, Any]) -> None:
    """Write a new file and force it to disk; its folder exists.

    Raises:
        CheckpointError: CKPT-016 for a tensor with a value that is not finite, before anything is written.
    """
    _require_finite("", content)
    with file.open("xb") as writer:
        torch.save(dict(content), writer)
        writer.flush()
        os.fsync(writer.fileno())


def _require_finite(name: str, content: Any) -> None:
    """`mm.checkpoint.finite.require_finite` of all tensors in nested dictionaries; a name is that of the last one."""
    if isinstance(content, torch.Tensor):
        require_finite(name, content)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            _require_finite(str(key), value)


def unreadable(file: Path, what: str) -> CheckpointError:
    """The error CKPT-021 about a file."""
    return CheckpointError(
        "CKPT-021",
        f"{file} cannot be used: {what.rstrip('.')}.",
        "Copy it again, or save it again with weights alone (--no-save-optim --no-save-rng).",
    )
