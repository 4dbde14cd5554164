"""Keeping of features that a training makes, in parts: shards in STORE/former, each written by one process.

A part is there whole or not at all; what a killed process had begun is removed by the next training. Each process may
write so many bytes and no more: the budget of all of them is dealt out when they begin.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from mm.config.units import format_bytes
from mm.data.features import Feature, Origin
from mm.data.files import TEMPORARY_PREFIX, make_folder
from mm.data.listing import FeatureRow
from mm.data.open_store import SampleTensors
from mm.data.store.catalog import is_sharded
from mm.data.store.shard import SHARDS
from mm.data.store.writer import ShardWriter, prompt_key
from mm.errors import DataWriteError
from mm.extract.claims import CLAIMS, Claims, all_claims
from mm.extract.former import FORMER
from mm.extract.store import WORK, live_claims, live_name

PART_BYTES = 64 * 10**6
PART_SECONDS = 300.0
_OF_A_PART = 16_384
_OF_A_SAMPLE = 6_144
"""Bytes of headers, index and list, at most, beside those of tensors and names."""

log = logging.getLogger(__name__)


@dataclass
class Allowance:
    """Bytes that this process may still write, of all its stores; None for no limit."""

    left: int | None

    def take(self, count: int) -> bool:
        """Take so many, if there are as many."""
        if self.left is None:
            return True
        if count > self.left:
            return False
        self.left -= count
        return True


@dataclass(frozen=True, slots=True)
class MadeSample:
    """A sample that was made: what is listed of it, its features, what they were made from, and as training has it."""

    row: FeatureRow
    feature: Feature
    origin: Origin
    prompt: bytes
    tensors: SampleTensors


class Parts:
    """The parts that this process writes for one store. Use it as a context manager: leaving it ends the open one."""

    def __init__(self, store: Path, recipe_key: str, allowance: Allowance, most_bytes: int = PART_BYTES) -> None:
        """
        Args:
            store: its folder. recipe_key: of it. allowance: bytes that may be written.
            most_bytes: of a part; after `PART_SECONDS` it ends smaller.
        """
        self._store, self._recipe_key = store, recipe_key
        self._allowance, self._most_bytes = allowance, most_bytes
        self._claims = Claims(store / WORK / CLAIMS)
        self._name = live_name(self._claims.owner.token)
        self._writer: ShardWriter | None = None
        self._since, self._bytes, self._count = 0.0, 0, 0
        self._refused = self._told = False
        self.open: dict[Origin, MadeSample] = {}
        """Samples of the part that is not ended, which nobody else can read yet."""

    def __enter__(self) -> Parts:
        self._claims.__enter__()
        self._claims.take(self._name)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.end()
        finally:
            self._claims.__exit__(None, None, None)
            remove_copied(self._store)

    def keep(self, made: MadeSample) -> bool:
        """Keep a sample, if there is room for it and the disk takes it; tells whether."""
        tensors = [made.feature.latents, *made.feature.features.values()]
        size = sum(tensor.nbytes for tensor in tensors if tensor is not None) + len(made.prompt) + _OF_A_SAMPLE
        size += 2 * len(made.row.sample.encode()) + 8 * len(made.row.cap) + len(str(made.feature.taken))
        if self._refused or not self._allowance.take(size + (0 if self._writer else _OF_A_PART)):
            self._tell_of_the_budget()
            return False
        try:
            writer = self._writer or self._begin()
            key = prompt_key(made.row.cap)
            writer.add_prompt(key, made.prompt, made.row.text_tokens)
            writer.add(made.row, made.feature, made.origin, (0, key))
        except DataWriteError as error:
            self._refuse(error)
            return False
        self.open[made.origin] = made
        self._bytes += size
        if self._bytes >= self._most_bytes or time.monotonic() - self._since > PART_SECONDS:
            self.end()
        return True

    def keep_prompt(self, caption: str, content: bytes, tokens: int) -> None:
        """Keep a caption's embedding in a part of its own, whatever the budget.

        Raises:
            DataError: DATA-018 and DATA-019 when it cannot be written.
        """
        self.end()
        self._begin().add_prompt(prompt_key(caption), content, tokens)
        self._allowance.take(len(content) + _OF_A_PART)
        self._commit()

    def end(self) -> None:
        """End the open part, so that others can read it; where the disk refuses it, what it held is gone."""
        try:
            self._commit()
        except DataWriteError as error:
            self._refuse(error)

    def _begin(self) -> ShardWriter:
        make_folder(self._store / FORMER, "the store's folder")
        target = self._store / FORMER / f"{self._name}-{self._count:06d}"
        self._writer = ShardWriter(self._store, 0, self._recipe_key, target)
        self._since, self._bytes = time.monotonic(), 0
        self._count += 1
        return self._writer

    def _commit(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with writer:
                writer.commit()
        self.open.clear()

    def _refuse(self, error: DataWriteError) -> None:
        """Keep nothing from here on."""
        self._refused = self._told = True
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None
        self.open.clear()
        message = "no more features are kept in %s, and those that are not are made each time they are needed: %s"
        log.warning(message, self._store, error.problems[0])

    def _tell_of_the_budget(self) -> None:
        if not self._told:
            self._told = True
            message = "the budget is used up (%s are kept in %s): features that are not kept are made each time"
            log.warning(message, format_bytes(kept_bytes(self._store)), self._store)


def kept_bytes(store: Path) -> int:
    """Bytes on disk of the features that a store holds, in shards and in parts."""
    folders = (store / SHARDS, store / FORMER)
    return sum(path.stat().st_size for folder in folders for path in folder.glob("[!.]*/*") if path.is_file())


def remove_copied(store: Path) -> None:
    """Remove the parts of a store that is finished, which has copies of them, when no training needs them any more."""
    if is_sharded(store) and not live_claims(store):
        shutil.rmtree(store / FORMER, ignore_errors=True)


def remove_left_behind(store: Path) -> None:
    """Remove what killed trainings had begun to write."""
    living = {claim.name for claim in live_claims(store)}
    for path in (store / FORMER).glob(f"{TEMPORARY_PREFIX}live-*"):
        if not any(path.name.startswith(f"{TEMPORARY_PREFIX}{name}-") for name in living):
            shutil.rmtree(path, ignore_errors=True)
    for claim in all_claims(store / WORK / CLAIMS):
        if claim.name.startswith(live_name("")) and claim.name not in living:
            (store / WORK / CLAIMS / claim.name).unlink(missing_ok=True)
