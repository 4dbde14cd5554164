"""A clip's frames as a file to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm.errors import ConfigError, DataWriteError
from mm.generate.video import encode_video

_WORST = 51  # of H.264's scale, whose best is 0


def save_video(frames: Sequence[Image.Image] | Tensor, path: str | Path, fps: int = 15, quality: float = 5) -> None:
    """Write frames as H.264 in an MP4 file, which gets its name when it is whole.

    Args:
        frames: of Pillow, or uint8 [F, H, W, 3]. path: of the file; one that is there is replaced.
        fps: frames a second. quality: from 0 to 10, the best, as imageio counts it.

    Raises:
        ConfigError: CFG-200 for a quality outside of its range.
        DataError: DATA-052 when it cannot be written.
    """
    if not 0 <= quality <= 10:
        raise ConfigError("CFG-200", f"quality is {quality}.", "Give a number from 0 to 10.")
    file = Path(path)
    pixels = frames if isinstance(frames, Tensor) else torch.from_numpy(np.stack([np.array(one) for one in frames]))
    partial = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        encode_video(partial, pixels.cpu(), fps, str(int((1 - quality / 10) * _WORST)))
        os.replace(partial, file)
    except (OSError, av.FFmpegError) as error:
        found = f"{file} cannot be written: {error.strerror or error}."
        raise DataWriteError("DATA-052", found, "Check the free space and the permissions of its folder.") from error
    finally:
        partial.unlink(missing_ok=True)
