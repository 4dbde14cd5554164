"""Writes the embedded default: tiny models, a data set, prompts and images, complete or not at all."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from PIL import Image

from mm.checkpoint.files import remove_folder, temporary_name
from mm.config.output import require_writable_folder
from mm.config.path_line import require_writable_as_text, write_paths
from mm.config.tasks.registry import FEATURE_TASKS
from mm.config.tasks.task import Column, Task
from mm.demo.clips import (
    COLOURS,
    DIRECTIONS,
    FPS,
    NUM_FRAMES,
    OPPOSITE,
    SIZE,
    DemoClip,
    Frames,
    all_captions,
    all_clips,
    edges,
    moving_block,
)
from mm.demo.components import MODEL_NAMES, encoders_of, is_whole, write_model, write_variant
from mm.demo.configs import annotation_name, list_names, write_configs
from mm.demo.video import write_video
from mm.errors import ConfigError
from mm.poses import direction_rows

log = logging.getLogger(__name__)


def write_demo(out: Path, clips_per_caption: int = 1) -> None:
    """Write the embedded default into the new folder `out`.

        weights/Wan2.1-T2V-Tiny-Diffusers/   the tiny models in the HF layout (components.py); -I2V- and -FLF2V- too
        dataset/data.json, dataset/videos/   captioned clips, 16 times `clips_per_caption`
        dataset/control/, dataset/masks/     the clips' edges, white on black; a block that moves, white on black
        dataset/poses/                       a camera's path for each clip, with which its shape moves so
        dataset/data_*.json                  the same list with the columns and files of each task that has some
        configs/                             the files that configure extraction, training and generation on them;
                                             in folders named after the tasks those of the other models
        prompts.txt                          the 16 captions, one a line
        images/                              first and last frame of a clip for each caption, not of the data set
        images_*.txt                         for each task with frames one line a caption: "first", or "first, last"

    It is written beside `out` under a temporary name and renamed when complete and on disk.

    Raises:
        ConfigError: CFG-080 when `out` is a file or a folder with content, CFG-081 when it cannot be written, CFG-130
            for a path that its lists cannot hold, CFG-131 for one where nothing can be written.
    """
    _require_free(out)
    require_writable_folder(out, "--out")
    require_writable_as_text(str(out.absolute()))
    place = Path(os.path.realpath(out))  # a link to an empty folder stays a link
    partial = place.parent / temporary_name(place.name)
    try:
        partial.mkdir(parents=True)
        weights = partial / "weights"
        for task in filter(is_whole, FEATURE_TASKS.values()):
            write_model(weights / MODEL_NAMES[task.name], task)
        for task in (task for task in FEATURE_TASKS.values() if not is_whole(task) and task.models_of is None):
            like = weights / MODEL_NAMES[encoders_of(task).name] / "transformer"
            write_variant(weights / MODEL_NAMES[task.name] / "transformer", task, like)
        _write_dataset(partial / "dataset", clips_per_caption)
        write_configs(partial / "configs", out)
        (partial / "prompts.txt").write_text("\n".join(all_captions()) + "\n", encoding="utf-8")
        for column in (column for task in FEATURE_TASKS.values() for column in task.columns):
            numbers = [str(_value(column, index)) for index in range(len(all_captions()))]
            (partial / f"{column.name}.txt").write_text("\n".join(numbers) + "\n", encoding="utf-8")
        _write_images(partial, out.absolute(), clips_per_caption)
        _force_to_disk(partial)
        os.rename(partial, place)
    except OSError as error:
        raise ConfigError(
            "CFG-081",
            f"The embedded default cannot be written to {out}: {error}.",
            "Check the path, its permissions and the free space (90 MiB); nothing was left behind.",
        ) from error
    finally:
        if partial.exists():
            remove_folder(partial)
    log.info("wrote %s", out)


def _require_free(out: Path) -> None:
    if os.path.isdir(out) and not any(out.iterdir()) and not os.path.ismount(out):
        return
    if os.path.lexists(out):
        raise ConfigError("CFG-080", f"{out} exists already.", "Give --out a new name or remove what is there.")


def _write_dataset(folder: Path, clips_per_caption: int) -> None:
    """`data.json` in the format of feature extraction, and the videos it lists."""
    (folder / "videos").mkdir(parents=True)
    rows = []
    clips = all_clips(clips_per_caption)
    for index, clip in enumerate(clips):
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
    beside = [_write_beside(folder, str(row["path"]), clip.draw()) for row, clip in zip(rows, clips, strict=True)]
    for task in FEATURE_TASKS.values():
        roles = {media.name for media in task.media}
        listed = [
            row
            | {column.name: _value(column, index) for column in task.columns}
            | {name: path for name, path in beside[index].items() if name in roles}
            for index, row in enumerate(rows)
        ]
        (folder / annotation_name(task)).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


def _write_beside(folder: Path, path: str, frames: Frames) -> dict[str, str]:
    """Write the files beside a clip, drawn of its frames; returns their paths by role."""
    control = path.replace("videos/", "control/")
    (folder / "control").mkdir(exist_ok=True)
    write_video(folder / control, edges(frames), FPS)
    mask = path.replace("videos/", "masks/")
    (folder / "masks").mkdir(exist_ok=True)
    write_video(folder / mask, moving_block(len(frames)), FPS)
    poses = str(Path(path.replace("videos/", "poses/")).with_suffix(".txt"))
    (folder / "poses").mkdir(exist_ok=True)
    direction = OPPOSITE[Path(path).stem.rpartition("_")[2]].title()
    lines = (" ".join(f"{number:.9g}" for number in row) for row in direction_rows(direction, len(frames)).tolist())
    (folder / poses).write_text("\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return {"control": control, "mask": mask, "camera": poses}


def _value(column: Column, index: int) -> int:
    """A number for a row, all over what a column may hold; the clips do not differ in it."""
    return round(column.lowest + (column.highest - column.lowest) * (index % 5) / 4)


def _write_images(folder: Path, home: Path, variant: int) -> None:
    """Images and other files to generate from, and the lists that name them where they will stand, below `home`.

    They are of a variant of each clip that the data set does not hold, so that none is one of training.
    """
    (folder / "images").mkdir()
    (folder / "inputs" / "videos").mkdir(parents=True)
    lines: dict[str, list[str]] = {task.name: [] for task in _with_images()}
    beside: dict[str, list[str]] = {}
    for index, (colour, direction) in enumerate((c, d) for c in COLOURS for d in DIRECTIONS):
        frames = DemoClip(colour, direction, variant).draw()
        names = [f"images/{index:04d}_{colour}_{direction}_{which}.png" for which in ("first", "last")]
        for name, frame in zip(names, (frames[0], frames[-1]), strict=True):
            Image.fromarray(frame).save(folder / name)
        paths = [str(home / name) for name in names]
        video = f"videos/{index:04d}_{colour}_{direction}.mp4"
        write_video(folder / "inputs" / video, frames, FPS)
        roles = {"video": video, **_write_beside(folder / "inputs", video, frames)}
        files = {name: str(home / "inputs" / path) for name, path in roles.items()}
        for name, path in {**files, "image": paths[0], "reference": paths[0]}.items():
            beside.setdefault(name, []).append(write_paths([path], ", "))
        for task, listed in lines.items():
            listed.append(write_paths(paths[: len(FEATURE_TASKS[task].frames)], ", "))
    for task, listed in lines.items():
        (folder / f"images_{task}.txt").write_text("\n".join(listed) + "\n", encoding="utf-8")
    named = {key: name for task in FEATURE_TASKS.values() if task.media for key, name in list_names(task).items()}
    for key, name in named.items():
        (folder / name).write_text("\n".join(beside[key]) + "\n", encoding="utf-8")


def _with_images() -> list[Task]:
    """The tasks that generate from frames."""
    return [task for task in FEATURE_TASKS.values() if task.frames and task.models_of is None]


def _force_to_disk(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
