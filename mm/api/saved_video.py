"""A clip's frames as a file to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.api.pipeline_values import value_problems
from mm.errors import ConfigError, DataWriteError, Problem, raise_all
from mm.generate.video import encode_video

_DENOMINATOR = 1001  # of NTSC's rates, 30000/1001
_WORST = 51  # of H.264's scale, whose best is 0


def save_video(frames: Sequence[Image.Image] | Tensor, path: str | Path, fps: float = 15, quality: float = 5) -> None:
    """Write frames as H.264 in an MP4 file, which gets its name when it is whole.

    Args:
        frames: of Pillow, or uint8 [F, H, W, 3]; at least one, all of one size, with even sides. path: of the file,
            which ends in .mp4; one that is there is replaced.
        fps: frames a second. quality: from 0 to 10, the best, as imageio counts it.

    Raises:
        ConfigError: CFG-446 for arguments that cannot be, all at once.
        DataError: DATA-052 when it cannot be written.
    """
    raise_all(ConfigError, list(_problems(frames, Path(path), fps, quality)))
    file = Path(path)
    pixels = frames if isinstance(frames, Tensor) else torch.from_numpy(np.stack([np.array(one) for one in frames]))
    partial = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        rate = Fraction(float(fps)).limit_denominator(_DENOMINATOR)
        encode_video(partial, pixels.cpu(), rate, str(int((1 - quality / 10) * _WORST)))
        os.replace(partial, file)
    except (OSError, av.FFmpegError) as error:
        found = f"{file} cannot be written: {error.strerror or error}."
        raise DataWriteError("DATA-052", found, "Check the free space and the permissions of its folder.") from error
    finally:
        partial.unlink(missing_ok=True)


def _problems(frames: Any, file: Path, fps: Any, quality: Any) -> Iterator[Problem]:
    """CFG-446."""
    yield from value_problems({"fps": fps, "quality": quality})
    if file.suffix.lower() != ".mp4":
        yield Problem("CFG-446", f"path is {file}, and what is written is MP4.", "Give it the ending .mp4.")
    if isinstance(frames, Tensor):
        sizes = {tuple(frames.shape[1:3])} if len(frames) > 0 else set()
    else:
        sizes = {(frame.height, frame.width) for frame in frames}
    if len(sizes) != 1:
        found = f"frames are of {len(sizes)} sizes." if sizes else "frames holds none."
        yield Problem("CFG-446", found, "Give one frame or more, all of one size.")
    elif any(side % 2 for side in next(iter(sizes))):
        height, width = next(iter(sizes))
        yield Problem("CFG-446", f"frames are {height}x{width}.", "H.264 wants even sides: crop or resize them.")
