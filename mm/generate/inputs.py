"""The files that a row names, read: images and a video as pixels of the clips' size."""

from __future__ import annotations

from torch import Tensor

from mm.config.run.generation import GenerationRun
from mm.generate.media_inputs import load_image, load_video
from mm.generate.rows import GenerationRow
from mm.generate.sources import Given


def load_given(run: GenerationRun, row: GenerationRow) -> Given:
    """A row's images and numbers; raises what `load_image` raises."""
    height, width = run.output.height, run.output.width
    return Given(tuple(load_image(path, height, width) for path in row.images), row.columns)


def load_given_video(run: GenerationRun, row: GenerationRow) -> Tensor | None:
    """The frames of a row's video, [3, F, H, W] pixels in [-1, 1], if it has one; raises what `load_video` raises."""
    if row.video is None:
        return None
    return load_video(row.video, run.inputs.start_frame or 0, *run.output.size)


def check_given(run: GenerationRun, row: GenerationRow) -> None:
    """Read all that a row names, so that hours of work do not end at a damaged file.

    Raises:
        DataError: what `load_image` and `load_video` raise.
    """
    load_given(run, row)
    load_given_video(run, row)
