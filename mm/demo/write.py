"""Writes the embedded default: the tiny model, its data set and the prompts, complete or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from mm.checkpoint.files import remove_folder, temporary_name
from mm.demo.clips import FPS, NUM_FRAMES, SIZE, all_captions, all_clips
from mm.demo.components import MODEL_NAME, write_model
from mm.demo.configs import write_configs
from mm.demo.video import write_video
from mm.errors import ConfigError

log = logging.getLogger(__name__)


def write_demo(out: Path, clips_per_caption: int = 1) -> None:
    """Write the embedded default into the new folder `out`.

        weights/Wan2.1-T2V-Tiny-Diffusers/   the tiny model in the HF layout (components.py)
        dataset/data.json, dataset/videos/   captioned clips, 16 times `clips_per_caption`
        configs/                             the files that configure extraction, training and generation on it
        prompts.txt                          the 16 captions, one a line

    It is written beside `out` under a temporary name and renamed when complete and on disk.

    Raises:
        ConfigError: CFG-080 when `out` is a file or a folder with content, CFG-081 when it cannot be written.
    """
    _require_free(out)
    partial = out.parent / temporary_name(out.name)
    try:
        partial.mkdir(parents=True)
        write_model(partial / "weights" / MODEL_NAME)
        _write_dataset(partial / "dataset", clips_per_caption)
        write_configs(partial / "configs", out)
        (partial / "prompts.txt").write_text("\n".join(all_captions()) + "\n", encoding="utf-8")
        _force_to_disk(partial)
        os.rename(partial, out)
    except OSError as error:
        raise ConfigError(
            "CFG-081",
            f"The embedded default cannot be written to {out}: {error}.",
            "Check the path, its permissions and the free space (10 MB); nothing was left behind.",
        ) from error
    finally:
        if partial.exists():
            remove_folder(partial)
    log.info("wrote %s", out)


def _require_free(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ConfigError("CFG-080", f"{out} exists already.", "Give --out a new name or remove what is there.")


def _write_dataset(folder: Path, clips_per_caption: int) -> None:
    """`data.json` in the format of feature extraction, and the videos it lists."""
    (folder / "videos").mkdir(parents=True)
    rows = []
    for index, clip in enumerate(all_clips(clips_per_caption)):
        path = f"videos/{index:04d}_{clip.colour}_{clip.direction}.mp4"
        write_video(folder / path, clip.draw(), FPS)
        rows.append(
            {
                "path": path,
                "cap": clip.caption,
                "num_frames": NUM_FRAMES,
                "fps": FPS,
                "resolution": {"height": SIZE, "width": SIZE},
            }
        )
    (folder / "data.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def _force_to_disk(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
