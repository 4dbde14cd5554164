"""Features of a live store that are there: in shards that extraction made, and in parts that trainings kept."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path

from mm.data.features import Origin, parse_header
from mm.data.files import TEMPORARY_PREFIX
from mm.data.store.blobs import Blob
from mm.data.store.shard import INDEX, KIND, Shard, shard_folder
from mm.data.store.table import open_table
from mm.data.store.writer import prompt_key
from mm.errors import DataError
from mm.extract.former import FORMER
from mm.extract.plan import Plan
from mm.extract.store import present_shards

_MOST_OPEN = 256
_TICK_NS = 2 * 10**9

log = logging.getLogger(__name__)


class Kept:
    """Finds features by what they were made from. A part costs the maps of its index and some 150 bytes a sample."""

    def __init__(self, store: Path, plan: Plan) -> None:
        self._store, self._plan = store, plan
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._parts: dict[str, Shard | None] = {}
        self._where: dict[bytes, list[tuple[str, int]]] = {}
        self._seen: int | None = None
        self._lost: set[Blob] = set()

    def find(self, planned: int, draw: int, origin: Origin) -> tuple[Blob, Blob] | None:
        """Places of a draw of a row of the plan and of its caption's embedding; None where it is not there."""
        found = self._in_shard(self._plan.shards_of(planned // self._plan.shard_rows)[draw], origin)
        if found is None:
            self._look_for_parts()
            found = self._in_parts(origin)
        return found

    def lose(self, blobs: tuple[Blob, Blob]) -> None:
        """Never find these again: they cannot be read."""
        self._lost.update(blobs)

    def empty_prompt(self) -> Blob | None:
        """Place of the empty caption's embedding, if it is there."""
        first = self._shard(0)
        self._look_for_parts()
        for shard in (first, *self._parts.values()):
            found = None if shard is None else shard.find_prompt(prompt_key(""))
            if found is not None and found not in self._lost:
                return found
        return None

    @property
    def samples_in_parts(self) -> int:
        """Number of samples in parts, those that are there twice counted twice."""
        self._look_for_parts()
        return sum(len(part) for part in self._parts.values() if part is not None)

    @property
    def samples_in_shards(self) -> int:
        """Number of samples in shards of the plan."""
        numbers = [number for number in present_shards(self._store) if number < self._plan.num_shards]
        return sum(len(shard) for shard in map(self._shard, numbers) if shard is not None)

    def _in_shard(self, number: int, origin: Origin) -> tuple[Blob, Blob] | None:
        shard = self._shard(number)
        if shard is None:
            return None
        row = next((row for row in range(len(shard)) if shard.name(row) == origin.sample), None)
        if row is None:
            return None
        prompt_shard, key = shard.prompt_of(row)
        other = shard if prompt_shard == number else self._shard(prompt_shard)
        return None if other is None else self._checked(shard.blob(row), other.find_prompt(key), origin)

    def _in_parts(self, origin: Origin) -> tuple[Blob, Blob] | None:
        for name, row in self._where.get(_hash(origin.sample), ()):
            part = self._parts[name]
            if part is None:
                continue
            _, key = part.prompt_of(row)
            found = self._checked(part.blob(row), part.find_prompt(key), origin)
            if found is not None:
                return found
        return None

    def _checked(self, sample: Blob, prompt: Blob | None, origin: Origin) -> tuple[Blob, Blob] | None:
        """The two where the sample says that it was made from that; its content is compared when it is read."""
        if prompt is None or sample in self._lost or prompt in self._lost or not isinstance(sample.file, Path):
            return None
        try:
            with open(sample.file, "rb") as stream:
                stream.seek(sample.offset)
                said = parse_header(stream, sample.length).origin
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return (sample, prompt) if said == origin else None

    def _shard(self, number: int) -> Shard | None:
        found = self._shards.get(number)
        if found is None:
            found = self._opened(shard_folder(self._store, number))
            if found is None:
                return None
            self._shards[number] = found
            if len(self._shards) > _MOST_OPEN:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return found

    def _look_for_parts(self) -> None:
        """Open parts that came since."""
        folder = self._store / FORMER
        try:
            changed = folder.stat().st_mtime_ns
            if changed == self._seen:
                return
            names = {name for name in os.listdir(folder) if not name.startswith(TEMPORARY_PREFIX)}
        except OSError:  # it is not there yet, or not any more
            return
        for name in sorted(names - self._parts.keys()):
            part = self._parts[name] = self._opened(folder / name)
            for row in range(0 if part is None else len(part)):
                assert part is not None  # noqa: S101  it has rows
                self._where.setdefault(_hash(part.name(row)), []).append((name, row))
        # what comes in the same tick of the folder's clock would not change it
        self._seen = changed if time.time_ns() - changed > _TICK_NS else None

    def _opened(self, folder: Path) -> Shard | None:
        if not (folder / INDEX).exists():
            return None
        try:
            table = open_table(folder / INDEX, KIND, "")
            return Shard(folder, table) if table.header.about.get("recipe") == self._plan.recipe else None
        except (DataError, KeyError, TypeError, ValueError) as error:
            log.warning("nothing of %s is used (%s)", folder, error)
            return None


def _hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()
