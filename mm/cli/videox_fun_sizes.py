"""scripts/process_json_add_width_and_height.py of VideoX-Fun: metadata with the size of every video and image.

Extraction needs none: it keeps what it has seen of a file, and looks at none twice. The file is for VideoX-Fun itself.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from mm.checkpoint.files import replace_text, writing_errors
from mm.cli.entry import run
from mm.config.base import load_json
from mm.config.flags import Flags, parse_flags, words_of_process
from mm.config.output import require_writable_file
from mm.data.image import probe_image
from mm.data.video import probe
from mm.errors import ConfigError, DataError, Problem, raise_all

_SIZES = ("width", "height")


class SizeFlags(Flags):
    """Write a metadata file anew, with the width and height of every video and image."""

    underscores: ClassVar[bool] = True

    input_file: Path = Field(description="metadata.json: a list of rows, or an object with the list in samples")
    output_file: Path = Field(description="gets the same rows with their sizes; may be the same file")
    base_dir: Path = Field(Path("."), description="folder that the paths start from")
    num_processes: int = Field(1, ge=1, description="files that are looked at at once")


def main(argv: Sequence[str]) -> None:
    """Look at all files and write.

    Raises:
        ConfigError: CFG-001 to CFG-007 for words and files, CFG-131 where it cannot be written, CFG-346 for a file that
            has no rows.
        DataError: what `mm.data.video.probe` and `mm.data.image.probe_image` raise, of all files at once.
    """
    flags = parse_flags(SizeFlags, argv, program="process_json_add_width_and_height.py")
    require_writable_file(flags.output_file, "--output_file")
    content = load_json(flags.input_file)
    rows = content.get("samples") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.get("file_path") for row in rows):
        found = f"{flags.input_file} is no list of rows with file_path."
        raise ConfigError("CFG-346", found, 'It is [{"file_path": ..., "text": ..., "type": ...}, ...].')
    with ThreadPoolExecutor(flags.num_processes) as threads:
        outcomes = list(threads.map(partial(_sized, base=flags.base_dir), rows))
    raise_all(DataError, [problem for _, problems in outcomes for problem in problems])
    sized = [row for row, _ in outcomes]
    whole = {**content, "samples": sized} if isinstance(content, dict) else sized
    with writing_errors():
        replace_text(flags.output_file, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    logging.getLogger(__name__).info("%d rows with their sizes are in %s", len(sized), flags.output_file)


def _sized(row: dict[str, Any], base: Path) -> tuple[dict[str, Any], Sequence[Problem]]:
    """The row with its size, and what is wrong with its file."""
    if all(row.get(name) for name in _SIZES):
        return row, ()
    file = base / row["file_path"]
    try:
        if row.get("type") == "video":
            info = probe(file)
            height, width = info.height, info.width
        else:  # as VideoX-Fun takes a row without a type
            height, width = probe_image(file)
    except DataError as error:
        return row, error.problems
    return {**row, "width": width, "height": height}, ()


if __name__ == "__main__":
    sys.exit(run(main, words_of_process()))
