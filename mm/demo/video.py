"""H.264 files of the embedded default's clips, written and read with PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import torch

from mm.data.containers import name_for_ffmpeg
from mm.data.video import probe, read_frames
from mm.demo.clips import Frames
from mm.errors import DataError

CONSTANT_RATE_FACTOR = "8"  # nearly lossless; the clips are a few kilobytes all the same


def write_video(path: Path, frames: Frames, fps: int) -> None:
    """Write uint8 [F, H, W, 3] RGB frames as H.264 in yuv420p, which every player and decord read.

    H and W must be even (chroma is subsampled by two).
    """
    height, width = frames.shape[1:3]
    with av.open(name_for_ffmpeg(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One encoder thread: the bytes then do not depend on the machine's number of cores.
        stream.options = {"crf": CONSTANT_RATE_FACTOR, "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read_video(path: Path) -> Frames:
    """All frames of a video, uint8 [F, H, W, 3] RGB.

    Raises:
        DataError: DATA-081 when the file cannot be read, is damaged or holds no frame.
    """
    try:
        info = probe(path)
        frames = torch.cat(list(read_frames(path, info, range(info.num_frames))))
    except DataError as error:
        message = f"{path} cannot be read as a video ({error.problems[0].message})"
        raise DataError("DATA-081", message, "Write the clip again.") from None
    return frames.permute(0, 2, 3, 1).contiguous().numpy()
