"""Contact sheets of `family_learning.py`: what a model was given above what it made of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from mm.demo.clips import SIZE

if TYPE_CHECKING:
    from family_learning import Judged

COLUMNS, SHOWN, GAP, LINE = 4, 3, 8, 14
STEP = SIZE + 2  # from one frame to the next
QUALITY = 80  # of WebP


def write_sheet(judged: Sequence[Judged], target: Path) -> None:
    """Write a WebP file: of each question its caption, and three frames of what was given and of the clip."""
    width, height = SHOWN * STEP + GAP, 2 * STEP + 2 * LINE + GAP
    lines = -(-len(judged) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width + GAP, lines * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, one in enumerate(judged):
        left, top = GAP + index % COLUMNS * width, index // COLUMNS * height
        right = one.hit("colour") and one.hit("direction")
        texts = dict.fromkeys((one.question.caption, one.question.label))
        for number, text in enumerate(texts):
            pen.text((left, top + number * LINE), text, fill="black" if right else "red")
        for row, frames in enumerate((one.question.shown, one.frames)):
            for column, number in enumerate((0, (len(frames) - 1) // 2, len(frames) - 1)):
                place = left + column * STEP, top + 2 * LINE + row * STEP
                sheet.paste(Image.fromarray(frames[number]), place)
    sheet.save(target, quality=QUALITY, method=6)
