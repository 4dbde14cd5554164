"""Text files with one text a line: prompts, and what belongs to them."""

from __future__ import annotations

import logging
from pathlib import Path

from mm.errors import DataError

log = logging.getLogger(__name__)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines are left out, and their number is logged.

    Raises:
        DataError: DATA-053 when the file cannot be read as UTF-8 text, DATA-054 when it holds no prompt.
    """
    lines = read_lines(path, "prompt")
    prompts = [line for line in lines if line]
    blank = len(lines) - len(prompts)
    log.info("%s: %d prompts%s", path, len(prompts), f", {blank} blank lines left out" if blank else "")
    return prompts


def read_lines(path: Path, what: str, may_end_blank: bool = False) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark, with any line ends, without blank last ones.

    Args:
        path: the file. what: is in its lines.
        may_end_blank: blank last lines stay, because they say something; all may be blank.

    Raises:
        DataError: DATA-053 when the file cannot be read, DATA-054 when it holds nothing.
    """
    try:
        # Not splitlines(): it would also cut a prompt at a form feed or a Unicode line separator.
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "DATA-053",
            f"The {what}s in {path} cannot be read ({error}).",
            f"Give a UTF-8 text file with one {what} a line (--{what}, or {what} in inference_model.json).",
        ) from None
    while lines and not lines[-1]:
        lines.pop()
        if may_end_blank:
            break  # it was the end of the line before
    if not any(lines) and not may_end_blank:
        raise DataError("DATA-054", f"{path} holds no {what}.", f"Write one {what} a line.")
    return lines
