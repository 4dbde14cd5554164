"""The file of prompts."""

from __future__ import annotations

import logging
from pathlib import Path

from mm.errors import DataError

log = logging.getLogger(__name__)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line of a UTF-8 text file, with or without a byte order mark, with any line ends.

    Blank lines are left out, and their number is logged.

    Raises:
        DataError: DATA-053 when the file cannot be read as UTF-8 text, DATA-054 when it holds no prompt.
    """
    try:
        # Not splitlines(): it would also cut a prompt at a form feed or a Unicode line separator.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "DATA-053",
            f"The prompts in {path} cannot be read ({error}).",
            "Give a UTF-8 text file with one prompt a line (--prompt, or prompt in inference_model.json).",
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError("DATA-054", f"{path} holds no prompt.", "Write one prompt a line.")
    blank = len(lines) - len(prompts) - (lines[-1] == "")
    log.info("%s: %d prompts%s", path, len(prompts), f", {blank} blank lines left out" if blank else "")
    return prompts
