"""Lists of shards: what data.jsonl has of a store of files, for people and tools."""

from __future__ import annotations

from itertools import islice

from pydantic import ValidationError

from mm.config.storage import Location
from mm.data.listing import ListedSample
from mm.data.remote.reading import open_lines
from mm.data.store.blobs import REMEDY
from mm.data.store.shard import LISTING, shard_folder
from mm.errors import DataError


def listed_sample(store: Location, shard: int, local: int, sample: str) -> ListedSample:
    """The row of one sample.

    Args:
        store: its folder. shard: number of the shard. local: number of the sample in it. sample: its id.

    Raises:
        DataError: DATA-150 when the list cannot be read or that row of it is of another sample.
    """
    path = shard_folder(store, shard) / LISTING
    try:
        with open_lines(path) as lines:
            line = next(islice(lines, local, None), b"")
        row = ListedSample.model_validate_json(line)
    except (OSError, ValidationError) as error:
        message = f"{path} has no whole row of sample {local + 1} of its shard ({type(error).__name__})."
        raise DataError("DATA-150", message, REMEDY) from None
    if row.sample != sample:
        message = f'{path}: row {local + 1} is of sample "{row.sample}", the index has "{sample}" there.'
        raise DataError("DATA-150", message, REMEDY)
    return row
