"""A contact sheet: frames of every generated clip with its caption, to be looked at without a video player."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mm.data.files import make_folder, write_atomically
from mm.demo.measure import MeasuredClip
from mm.demo.video import read_video

matplotlib.use("Agg")

NUM_FRAMES_SHOWN = 5


def draw_sheet(rows: Sequence[MeasuredClip], target: Path) -> None:
    """Draw first to last frame of each clip, two clips a line, into the PNG `target`.

    Args:
        rows: from `mm.demo.measure.score`; a caption that its clip does not obey is drawn in red.
        target: the PNG to write.

    Raises:
        DataError: what `write_png` raises.
    """
    lines = (len(rows) + 1) // 2
    figure = Figure(figsize=(9, 0.95 * lines), layout="constrained")
    for side, column in enumerate(figure.subfigures(1, 2, squeeze=False)[0]):
        axes = column.subplots(lines, NUM_FRAMES_SHOWN, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for line, row in zip(axes, rows[side * lines : (side + 1) * lines], strict=False):
            frames = read_video(row.path)
            for number, axis in enumerate(line):
                axis.imshow(frames[number * (len(frames) - 1) // (NUM_FRAMES_SHOWN - 1)])
            obeys = row.colour_hit and row.direction_hit
            line[0].set_title(row.caption, fontsize=7, loc="left", color="black" if obeys else "red")
    write_png(figure, target, dpi=110)


def write_png(figure: Figure, target: Path, dpi: int) -> None:
    """Write a figure, whole or not at all, into a folder that is made.

    Raises:
        DataError: DATA-018 or DATA-019 when it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    make_folder(target.parent, str(target))
    write_atomically(target, [drawn.getvalue()], len(drawn.getvalue()))
