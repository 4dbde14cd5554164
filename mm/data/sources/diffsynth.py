"""DiffSynth-Studio's metadata.csv, .json and .jsonl: `video` or `image`, `prompt`, and columns of further files.

The columns of further files that its examples have are known; others are named by `file_keys`, as `--data_file_keys`
names them there. An image is a video of one frame, in whichever of the two columns it stands. There the training code
reads `video` alone; here a row with an `image` and no `video` is one too.
"""

from __future__ import annotations

from collections.abc import Sequence

from mm.config.data import DataSource
from mm.config.tasks.task import Column
from mm.data.sources.base import Dialect, OpenSource, Taken
from mm.data.sources.cells import Cells
from mm.data.sources.table import UNUSED_COLUMNS, CellSource, target

_ROLES = {
    "control_video": "control",
    "reference_image": "reference",
    "input_image": "first_frame",
    "end_image": "last_frame",
    "vace_video": "vace_video",
    "vace_video_mask": "mask",
    "vace_reference_image": "vace_reference",
}
"""Columns of its examples whose cells are paths, with their roles."""
_UNUSED = frozenset({"camera_control_direction", "camera_control_speed", "negative_prompt", "seed"})


def _take(cells: Cells, source: DataSource, /) -> Taken | None:
    video, image = cells.text("video"), cells.text("image")
    if video is not None and image is not None:
        cells.wrong(" has a video and an image, and one of them is the sample.", "Leave one cell empty.")
    path = video if video is not None else image
    if path is None and not cells.problems:
        cells.wrong(" has no path in video or image.", "Add it.")
    captions = cells.captions("prompt")
    roles = {name: name for name in source.file_keys if name not in ("video", "image")} | _ROLES
    given = [(role, cells.files(name, source.folder)) for name, role in roles.items()]  # several columns have one role
    kind = cells.kind(path) if path is not None else "video"
    return target(path, captions, source, kind=kind, roles={role: paths for role, paths in given if paths})


def _open(source: DataSource, columns: Sequence[Column], /) -> OpenSource:
    return CellSource(
        source,
        columns,
        take=_take,
        path_columns=("video", "image"),
        caption_columns=("prompt",),
        unused=UNUSED_COLUMNS | _UNUSED | frozenset(source.left_out),
    )


DIFFSYNTH = Dialect("diffsynth", (frozenset({"video", "image"}), frozenset({"prompt"})), _open)
