"""Captions from a Parquet table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from mm.data.files import path_below, raise_limited, require_regular_file
from mm.errors import DataError, Problem, raise_all

if TYPE_CHECKING:
    from mm.data.sources.simpletuner_entries import ParquetFields

_ROWS = 10_000  # that are read at once


def parquet_captions(folder: Path, fields: ParquetFields | None, place: str) -> dict[str, str]:
    """The captions of a table by name of file; a file without one in either column is not there.

    Args:
        folder: that the table's path starts from. fields: the entry's. place: how to call the entry.

    Raises:
        DataError: DATA-060 for a table that cannot be read or lacks a column, DATA-061 for rows that name no file, as
            pandas' NaN, DATA-001 and DATA-063 for its path.
    """
    if fields is None:
        raise ValueError("an entry without its table was let pass")
    path = path_below(folder, fields.path, place)
    require_regular_file(path, place)
    wanted = [fields.filename_column, fields.caption_column]
    wanted += [fields.fallback_caption_column] if fields.fallback_caption_column is not None else []
    captions: dict[str, str] = {}
    nameless: list[str] = []
    number = 0
    try:
        table = ParquetFile(path)
        lacking = [name for name in wanted if name not in table.schema_arrow.names]
        raise_all(
            DataError, [Problem("DATA-060", f"{path} lacks the column {name}.", "Correct it.") for name in lacking]
        )
        for batch in table.iter_batches(batch_size=_ROWS, columns=wanted):
            columns = [batch.column(name).to_pylist() for name in wanted]
            for file, *texts in zip(*columns, strict=True):
                number += 1
                if not isinstance(file, str | int) or file == "":
                    nameless.append(f"{path} row {number}: {fields.filename_column} is {file!r:.80}, and no name.")
                caption = next((text for text in texts if _says(text)), None)
                if caption is not None:
                    captions[str(file)] = caption
    except (OSError, ArrowException) as error:
        raise DataError("DATA-060", f"{path} cannot be read ({error}).", "Check that it is a Parquet file.") from None
    raise_limited([Problem("DATA-061", message, "Name the file, or remove the row.") for message in nameless])
    return captions


def _says(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
