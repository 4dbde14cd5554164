"""Clips on disk: `video_0000.mp4` with `video_0000.json` beside it, complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import uuid4

import av
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from mm.data.containers import name_for_ffmpeg
from mm.errors import DataWriteError

# Visually lossless for H.264; a clip is looked at, not measured, and stays small enough to send around.
CONSTANT_RATE_FACTOR = "16"
BT709 = 1  # its number in ITU-T H.273, for primaries and for the transfer function


def clip_path(folder: Path, index: int) -> Path:
    """Path of the clip of the prompt with this index."""
    return folder / f"video_{index:04d}.mp4"


def prepare_folder(folder: Path) -> None:
    """Make the folder for clips, and check that they can be written, before anything is computed.

    Every process of a job may do so at the same time.

    Raises:
        DataError: DATA-051 when the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-probe-{uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataWriteError(
            "DATA-051",
            f"Clips cannot be written to {folder}: {error.strerror or error}.",
            "Check --save-path (save_path in inference_model.json), its permissions and the free space.",
        ) from None


def write_clip(path: Path, frames: Tensor, fps: int, description: Mapping[str, Any]) -> None:
    """Write a clip and its description; both get their names only when both are complete and on disk.

    Args:
        path: of the clip.
        frames: uint8 [F, H, W, 3] RGB; H and W even.
        fps: frames a second.
        description: what made the clip, JSON values.

    Raises:
        DataError: DATA-052 when they cannot be written.
    """
    description_path = path.with_suffix(".json")
    # The description first: a clip that is there always has one.
    partials = {target: target.with_name(f".tmp-{os.getpid()}-{target.name}") for target in (description_path, path)}
    try:
        text = json.dumps(description, ensure_ascii=False, indent=2) + "\n"
        partials[description_path].write_text(text, encoding="utf-8")
        encode_video(partials[path], frames, fps)
        for partial in partials.values():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        for target, partial in partials.items():
            os.replace(partial, target)
    except (OSError, av.FFmpegError) as error:
        raise DataWriteError(
            "DATA-052",
            f"{path} cannot be written: {error.strerror or error}.",
            "Check the free space and the permissions of --save-path, then run the same command again; it goes on.",
        ) from error
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def encode_video(path: Path, frames: Tensor, fps: int | Fraction, rate_factor: str = CONSTANT_RATE_FACTOR) -> None:
    """Encode uint8 [F, H, W, 3] RGB frames as H.264 in an MP4 file, yuv420p, colours by BT.709 and marked so."""
    _, height, width, _ = frames.shape
    with av.open(name_for_ffmpeg(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One encoder thread: the file's bytes then do not depend on the machine's number of cores.
        stream.options = {"crf": rate_factor, "threads": "1"}
        # Unmarked, players guess the colours from the height, and the same clip looks different at 480p and 720p.
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
        for array in frames.numpy():
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())
