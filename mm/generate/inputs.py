"""The files that a row names, read: pixels of the clips' size, masks and camera paths."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mm.config.run.generation import GenerationRun
from mm.config.run.listed import begins_as
from mm.generate.media_inputs import load_image, load_mask, load_picture, load_video
from mm.generate.rows import GenerationRow
from mm.generate.sources import Given, camera_rows


def load_given(run: GenerationRun, row: GenerationRow) -> Given:
    """Inputs of a row's clip, as values.

    Raises:
        DataError: what `load_image` and `load_video` raise.
        ConfigError: what `camera_rows` and `load_mask` raise.
    """
    frames, height, width = run.output.size
    start, begins = run.inputs.start_frame or 0, begins_as(run.row_task, run.inputs.shown)
    source, edited = row.path(begins), None if begins == "videos" else row.path("videos")
    control, mask = row.path("controls"), row.path("masks")
    return Given(
        images=tuple(load_image(path, height, width) for path in row.paths("images")),
        columns=row.columns,
        begins_as=None if source is None else load_video(source, start, *run.output.size),
        video=None if edited is None else load_video(edited, start, *run.output.size),
        mask=None if mask is None else load_mask(mask, edited, start, run.output.size),
        control=None if control is None else load_video(control, 0, *run.output.size),
        references=tuple(_reference(run, path) for path in row.paths("references")),
        camera=None if row.camera is None else camera_rows(row.camera, frames),
        settings=run.inputs.settings,
        text_only=run.inputs.text_only,
    )


def _reference(run: GenerationRun, path: Path) -> Tensor:
    """A reference: a frame, or, where a line may have several, a picture of its own size."""
    if run.row_lists["references"].kind == "images":
        return load_picture(path)
    return load_image(path, run.output.height, run.output.width)
