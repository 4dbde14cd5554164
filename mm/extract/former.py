"""Samples of shards that the plan no longer has: their features are copied into new shards, and not made again.

STORE/former/<number>-<word>   shards whose rows or files have changed, that were damaged, or of another cut of the rows
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import numpy as np
from torch import Tensor

from mm.data.features import Feature, Origin, text_hash
from mm.data.files import make_folder, write_error
from mm.data.store.blobs import Blob, read_tensors
from mm.data.store.shard import INDEX, KIND, Shard, shard_folder
from mm.data.store.table import open_table
from mm.errors import DataError

FORMER = "former"

log = logging.getLogger(__name__)


def put_aside(store: Path, number: int) -> None:
    """Make a shard a former one; where another process was faster, nothing is done.

    Raises:
        DataError: DATA-018 when it cannot be renamed.
    """
    make_folder(store / FORMER, "the store's folder")
    source, target = shard_folder(store, number), store / FORMER / f"{number:08d}-{uuid4().hex[:12]}"
    try:
        os.rename(source, target)
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_error(target, 0, error) from error


@dataclass(frozen=True, slots=True)
class FormerSample:
    """A sample of a former shard: its blob, and its caption's where the shard has that."""

    blob: Blob
    prompt: Blob | None


class Former:
    """The samples of all former shards of a store: 16 bytes of memory for each."""

    def __init__(self, store: Path, half_done: Iterable[int] = ()) -> None:
        """
        Args:
            store: its folder. half_done: shards of runs of which other draws are missing; they are copied as well.
        """
        folder = store / FORMER
        folders = sorted(folder.iterdir()) if folder.is_dir() else []
        self._shards = list(_readable([*folders, *(shard_folder(store, number) for number in half_done)]))
        names = (shard.name(row) for shard in self._shards for row in range(len(shard)))
        hashes = np.frombuffer(b"".join(map(_hash, names)), "<u8")
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._begins = np.cumsum([0, *map(len, self._shards)])

    def find(self, origin: Origin) -> FormerSample | None:
        """A sample that was made from the very same, whole; None where there is none."""
        if not self._shards:
            return None
        wanted = np.frombuffer(_hash(origin.sample), "<u8")[0]
        first, last = (int(np.searchsorted(self._hashes, wanted, side=side)) for side in ("left", "right"))
        for place in self._order[first:last]:
            number = int(np.searchsorted(self._begins, place, side="right")) - 1
            shard, row = self._shards[number], int(place - self._begins[number])
            blob = shard.blob(row)
            if read_former(blob, origin) is not None:
                return FormerSample(blob, shard.find_prompt(shard.prompt_of(row)[1]))
        return None


def read_former(blob: Blob, origin: Origin) -> Feature | None:
    """A sample of a former shard, without its caption's embedding; None where the blob is damaged or another's."""
    try:
        header, tensors = read_tensors(blob, str(blob))
    except DataError:
        return None
    if header.origin != origin or "latents" not in tensors:
        return None
    latents = tensors.pop("latents")
    return Feature(latents, latents.new_zeros(0), header.start_frame, tensors, header.taken)


def read_former_prompt(blob: Blob | None, caption: str, recipe: str) -> Tensor | None:
    """The embedding of a caption in a former shard; None where it is not there, or is not whole."""
    if blob is None:
        return None
    try:
        header, tensors = read_tensors(blob, str(blob))
    except DataError:
        return None
    is_same = (header.origin.recipe, header.origin.caption) == (recipe, text_hash(caption))
    return tensors.get("prompt") if is_same else None


def _hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()


def _readable(folders: Iterable[Path]) -> Iterator[Shard]:
    for path in folders:
        try:
            yield Shard(path, open_table(path / INDEX, KIND, ""))
        except (DataError, KeyError, TypeError, ValueError) as error:
            log.info("nothing of %s is used (%s)", path, error)
