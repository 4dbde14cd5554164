"""`mm score`: which generated clips of the embedded default show what their captions ask for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from mm.cli.entry import run
from mm.config.flags import Flags, parse_flags
from mm.config.output import require_writable_file
from mm.data.text_lines import read_prompts
from mm.demo.measure import MeasuredClip, score
from mm.demo.sheet import draw_sheet
from mm.errors import DataError


class ScoreFlags(Flags):
    """Measure colour and direction of the shape in generated clips of the embedded default."""

    videos: Path = Field(description="folder of mp4 files, one for each prompt, in order")
    prompts: Path = Field(description="the text file they were generated from")
    sheet: Path | None = Field(None, description="PNG to draw the clips into, with their captions")
    at_least: int | None = Field(None, ge=0, description="fail unless so many clips have the colour, and the direction")


def main(argv: Sequence[str]) -> None:
    """Print one line for each clip and the two counts.

    Raises:
        DataError: DATA-083 when fewer than `--at-least` clips obey, and what `mm.demo.measure.score` raises.
    """
    flags = parse_flags(ScoreFlags, argv, program="mm score")
    if flags.sheet is not None:
        require_writable_file(flags.sheet, "--sheet")
    captions = read_prompts(flags.prompts)
    colours, directions, rows = score(flags.videos, captions)
    print("\n".join(_line(row) for row in rows))
    print(f"colour {colours} of {len(rows)}, direction {directions} of {len(rows)}")
    if flags.sheet is not None:
        draw_sheet(rows, flags.sheet)
        print(f"wrote {flags.sheet}")
    if flags.at_least is not None and min(colours, directions) < flags.at_least:
        raise DataError(
            "DATA-083",
            f"{colours} clips have the colour and {directions} the direction of their captions, of {len(rows)}.",
            f"At least {flags.at_least} of each were asked for; train longer.",
        )


def _line(row: MeasuredClip) -> str:
    verdict = "ok" if row.colour_hit and row.direction_hit else "NOT AS ASKED"
    return f"{row.path.name}  {row.caption:<32} shows {row.seen.colour} {row.seen.direction}  {verdict}"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
