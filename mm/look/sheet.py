"""The contact sheet: one PNG with a strip of frames for each sample that a page shows."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from mm.look.facts import Looked, LookedSample
from mm.look.page import size_in_words, thumbnail

_HEIGHT, _LONGEST = 96, 150
_LINE, _GAP = 17, 8
_COLUMNS = 2
_PAPER, _INK, _QUIET = (255, 255, 255), (28, 29, 31), (110, 114, 120)


def draw_sheet(looked: Looked) -> bytes:
    """The PNG: samples in their order, two columns, each with its number, id, size and caption.

    A letter that the font does not have is drawn as a box; the page has all of them.
    """
    samples = [sample for batch in looked.batches for sample in batch.samples]
    cells = [_cell(number, sample) for number, sample in enumerate(samples, start=1)]
    width = max((cell.width for cell in cells), default=1)
    rows = [cells[first : first + _COLUMNS] for first in range(0, len(cells), _COLUMNS)]
    heights = [max(cell.height for cell in row) for row in rows]
    columns = min(_COLUMNS, len(cells)) or 1
    size = (columns * (width + 2 * _GAP) + _GAP, sum(heights) + _GAP * (len(rows) + 1))
    sheet = Image.new("RGB", size, _PAPER)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP + column * (width + 2 * _GAP), top))
        top += height + _GAP
    content = io.BytesIO()
    sheet.save(content, "PNG", optimize=True)
    return content.getvalue()


def _cell(number: int, sample: LookedSample) -> Image.Image:
    """One sample: two lines of text over its frames."""
    pictures = []
    for frame in sample.strips[0].frames:
        picture = thumbnail(frame.pixels, _LONGEST)
        scale = _HEIGHT / picture.height
        pictures.append(picture.resize((max(1, round(picture.width * scale)), _HEIGHT)))
    width = max(480, sum(picture.width + 2 for picture in pictures))
    cell = Image.new("RGB", (width, 2 * _LINE + _HEIGHT), _PAPER)
    draw, font = ImageDraw.Draw(cell), _font()
    caption = "(dropped) " if sample.without_caption else ""
    lines = [(f"{number}  {sample.id}  {size_in_words(sample.size)}", _QUIET), (caption + sample.caption, _INK)]
    for row, (text, colour) in enumerate(lines):
        draw.text((0, row * _LINE), _fitting(" ".join(text.split()), font, width), fill=colour, font=font)
    left = 0
    for picture in pictures:
        cell.paste(picture, (left, 2 * _LINE))
        left += picture.width + 2
    return cell


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The begin of a text that has room."""
    if font.getlength(text[:400]) <= width and len(text) <= 400:
        return text
    low, high = 0, min(len(text), 400)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle] + "…") <= width else (low, middle - 1)
    return text[:low] + "…"


def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 12)
