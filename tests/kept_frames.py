"""Frames of clips as they were before a codec changed some of them: what two runs are compared by."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


@contextmanager
def keeping_frames(*writers: ModuleType) -> Iterator[None]:
    """Have these modules' `write_clip` leave the frames beside each clip, in this process."""
    written = {module: module.write_clip for module in writers}

    def keep(module: ModuleType) -> Any:
        def write(path: Path, frames: Any, *rest: Any) -> None:
            np.save(path.with_suffix(".npy"), frames.numpy())
            written[module](path, frames, *rest)

        return write

    for module in writers:
        module.write_clip = keep(module)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, write in written.items():
            module.write_clip = write  # type: ignore[attr-defined]


def largest_difference(folder: Path, other: Path) -> int:
    """Of the frames kept in two folders, in steps of 255; both must have the same clips."""
    names = [sorted(path.name for path in of.glob("*.npy")) for of in (folder, other)]
    assert names[0] == names[1] != []
    pairs = [(np.load(folder / name).astype(int), np.load(other / name)) for name in names[0]]
    return max(int(np.abs(ours - theirs).max()) for ours, theirs in pairs)
