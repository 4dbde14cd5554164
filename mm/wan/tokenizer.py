"""The tokenizer of the text encoder, loaded from a local folder without running anything of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mm.errors import DataError
from mm.wan.component import first_line
from mm.wan.foreign_code import refuse_code


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer of the transformers library.

    Raises:
        DataError: DATA-043 when the folder holds none that can be loaded, DATA-120 when it asks for code of its own.
    """
    refuse_code(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises errors of many unrelated types here
        message = f"{folder} holds no tokenizer that can be loaded ({first_line(error)})."
        raise DataError("DATA-043", message, "Correct from_pretrained in tokenizer_config.") from None
