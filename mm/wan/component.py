"""One component of a model folder in the diffusers layout, loaded strictly: VAE, text encoder or image encoder."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging as transformers_logging

from mm.errors import DataError
from mm.wan.foreign_code import refuse_code
from mm.wan.shards import find_shards

_FIX_FOLDER = "Correct from_pretrained: the folder of this component in the diffusers layout, with its config.json."


def load_strictly(model_class: type[nn.Module], folder: Path, unused: Collection[str] = (), **options: Any) -> Any:
    """Load a diffusers or transformers model, accepting nothing missing and nothing left over.

    Args:
        model_class: with a `from_pretrained` of its library. folder: in the diffusers layout, local.
        unused: tensors that such a folder may hold and the model has no part for.
        options: for `from_pretrained`, such as the precision.

    Returns:
        The model.

    Raises:
        DataError: DATA-023 to DATA-025 for shards that are missing or do not fit their index, DATA-040 when the folder
            or its config.json is missing, DATA-041 for weights that are missing, unexpected or of another shape,
            DATA-042 for files that cannot be read, DATA-120 and DATA-121 for a folder that asks for code or for another
            model.
    """
    if not (folder / "config.json").is_file():
        raise DataError("DATA-040", f"{folder / 'config.json'} does not exist.", _FIX_FOLDER)
    if not any(folder.glob("*.safetensors")):
        remedy = "Download the safetensors files; weights in other formats are not read."
        raise DataError("DATA-040", f"{folder} has no safetensors file.", remedy)
    refuse_code(folder)
    _require_whole_files(folder)
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # the library's report of what did not fit is below, as an error
    try:
        model, report = model_class.from_pretrained(  # type: ignore[attr-defined]
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # the libraries raise errors of many unrelated types here
        mismatch = "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error)
        message = f"{folder} cannot be loaded as {model_class.__name__} ({first_line(error)})."
        remedy = "Check that config.json belongs to these weights." if mismatch else "Copy or download the files again."
        raise DataError("DATA-041" if mismatch else "DATA-042", message, remedy) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    _require_exact({**report, "unexpected_keys": set(report["unexpected_keys"]) - set(unused)}, model_class, folder)
    return model


def _require_whole_files(folder: Path) -> None:
    """Say which file is missing or cut off, where the libraries speak of tensors or of a header."""
    try:
        find_shards(folder)
    except DataError as error:
        if error.id != "DATA-022":
            raise
        raise DataError("DATA-042", error.problems[0].message, error.problems[0].remedy) from None


def _require_exact(report: dict[str, Any], model_class: type[nn.Module], folder: Path) -> None:
    differences = [
        f"{kind} {_some(report[key])}"
        for kind, key in (("missing", "missing_keys"), ("unexpected", "unexpected_keys"), ("wrong", "mismatched_keys"))
        if report[key]
    ]
    if differences:
        message = f"The weights in {folder} are not those of a {model_class.__name__}: {'; '.join(differences)}."
        raise DataError("DATA-041", message, "Use the folder of a complete Wan2.1 model in the diffusers layout.")


def _some(names: Iterable[Any]) -> str:
    """The first few names and how many there are."""
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def first_line(error: Exception) -> str:
    """The first line of a library's message, which often has many."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(":")
