"""Refusal of model folders that ask for code of their own, or for parts from elsewhere.

The libraries that load encoders and tokenizers follow requests in a folder's JSON files: a Python file beside them
(`auto_map`, which transformers offers to run by a question on standard input), a kernel from the Hub
(`attn_implementation` with a repository's name), a base model somewhere else (`adapter_config.json`). Nothing here
needs any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm.errors import DataError

_CODE = ("auto_map", "custom_pipelines", "custom_generate")
"""Keys that name Python files or repositories whose code a library would run."""
_KERNELS = ("attn_implementation", "experts_implementation")
"""Ends of keys that name an implementation, or a kernel to download as owner/name."""


def refuse_code(folder: Path) -> None:
    """Look through the JSON files of a model's component before a library reads them.

    Args:
        folder: of one component. Files that hold no JSON are left to what reads them.

    Raises:
        DataError: DATA-120 when a file asks for code to run; DATA-121 when the folder refers to another model.
    """
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        asked = next(_requests(content), None)
        if asked is not None:
            raise DataError(
                "DATA-120",
                f"{file} asks for code to be run ({asked}); files of models run no code here.",
                "Use the original Wan2.1 folder, or remove that key if the rest of the folder is as it should be.",
            )
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        raise DataError(
            "DATA-121",
            f"{adapter} would make the library load another model in place of {folder}.",
            "Merge the adapter into the component's weights, or move that file away.",
        )


def _requests(content: Any) -> Iterator[str]:
    """Every request for code anywhere in a JSON value, as `key: value`, shortened."""
    if isinstance(content, list):
        for inner in content:
            yield from _requests(inner)
    elif isinstance(content, dict):
        for key, inner in content.items():
            kernel = key.endswith(_KERNELS) and any("/" in text for text in _texts(inner))
            if kernel or (key in _CODE and inner):
                yield f"{key}: {json.dumps(inner)[:100]}"
            else:
                yield from _requests(inner)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
