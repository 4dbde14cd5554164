"""Samples of a store of shards as exports take them: what is listed of each, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mm.data.features import Header
from mm.data.remote.reading import open_lines
from mm.data.store.blobs import REMEDY, Blob, read_raw_blobs
from mm.data.store.opened import ShardStore
from mm.data.store.shard import LISTING, shard_folder
from mm.errors import DataError


@dataclass(frozen=True)
class ListedSample:
    """A sample as it is listed.

    Attributes:
        index: of it in the store. shard: its number. draw: which of the sample's it is, from 0.
        row: what its listing says (`mm.data.listing.FeatureRow`).
        blobs: places of the sample and of its caption's embedding.
    """

    index: int
    shard: int
    draw: int
    row: Mapping[str, Any]
    blobs: tuple[Blob, Blob]

    def read(self, recipe_key: str) -> tuple[Header, dict[str, Tensor]]:
        """Header and tensors, those of its caption too; raises what `read_raw_blobs` raises."""
        return read_raw_blobs(*self.blobs, (self.row["sample"], recipe_key))


def listed_samples(store: ShardStore, number: int) -> Iterator[ListedSample]:
    """The samples of one shard, in their order.

    Raises:
        DataError: DATA-151 where the shard's list is missing or another one, and what opening the shard raises.
    """
    shard, first = store.shard(number), store.first_of(number)
    place = shard_folder(store.folder, number) / LISTING
    try:
        with open_lines(place) as lines:
            rows = [json.loads(line) for line in lines]
        names = [row["sample"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("DATA-151", f"{place} cannot be read ({error}).", REMEDY) from None
    if names != [shard.name(row) for row in range(len(shard))]:
        raise DataError("DATA-151", f"{place} lists other samples than its shard holds.", REMEDY)
    for row, said in enumerate(rows):
        draw = (first + row) * store.draws // len(store)
        yield ListedSample(first + row, number, draw, said, store.blobs_of(first + row))
