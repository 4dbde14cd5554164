"""Care of a store of shards: what is there, which shards are damaged, and room for them to be made again."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm.config.storage import Location
from mm.data.features import FEATURES, LISTING
from mm.data.files import TEMPORARY_PREFIX
from mm.data.recipe import load_recipe
from mm.data.remote.reading import names_in
from mm.data.store.blobs import read_blob
from mm.data.store.catalog import MANIFEST, Catalog, is_sharded, open_catalog
from mm.data.store.shard import INDEX, KIND, SHARDS, LatentShape, ShardFacts, open_shard, shard_folder
from mm.data.store.table import NO_DAMAGE, read_table_header
from mm.errors import DataError, Problem

_NUMBER = re.compile(r"[0-9]{8}")


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """State of a store.

    Attributes:
        finished: it can be trained on.
        shards, samples: that are there; of a finished store, that it has.
        missing: shards that a finished store lacks.
        unfinished: shards being written, or left by a process that was killed.
        shapes: samples of each latent shape.
        body_bytes: features of all shards.
    """

    finished: bool
    shards: int
    samples: int
    missing: Sequence[int]
    unfinished: int
    shapes: Counter[LatentShape]
    body_bytes: int


@dataclass(frozen=True, slots=True)
class DamagedShard:
    """A shard that is missing or damaged, and what is wrong with it."""

    number: int
    problems: Sequence[Problem]


def store_status(store: Location) -> StoreStatus:
    """Contents of a store, from the headers of its shards.

    Raises:
        DataError: DATA-010 for a folder that is no store, DATA-186 for one of one file a sample, DATA-150 for a shard
            without a readable index, and what `mm.data.store.catalog.open_catalog` raises of a finished store.
    """
    recipe = load_recipe(store)
    _check_form(store)
    present = _present(store)
    known = open_catalog(store, recipe.key).manifest.shards if is_sharded(store) else None
    shapes: Counter[LatentShape] = Counter()
    samples = body_bytes = 0
    for number in present:
        about = read_table_header(shard_folder(store, number) / INDEX, KIND, "Run mm data repair on the store.").about
        samples += about["samples"]
        body_bytes += about["body_bytes"]
        for channels, frames, height, width, count in about["shapes"]:
            shapes[channels, frames, height, width] += count
    missing = sorted(set(range(known or 0)) - set(present))
    unfinished = sum(name.startswith(TEMPORARY_PREFIX) for name in names_in(store / SHARDS))
    return StoreStatus(known is not None, len(present), samples, missing, unfinished, shapes, body_bytes)


def _check_form(store: Location) -> None:
    """Refuse a store of one file a sample.

    Raises:
        DataError: DATA-186.
    """
    if isinstance(store, Path) and ((store / LISTING).exists() or (store / FEATURES).is_dir()):
        remedy = "mm doctor data reads all of it; mm migrate shards makes a store of shards of it."
        raise DataError("DATA-186", f"{store} is a store of one file a sample, and no store of shards.", remedy)


def damaged_shards(store: Path, done: Callable[[int, int], None]) -> list[DamagedShard]:
    """Read every byte of every shard and compare it with its checksum.

    Args:
        store: its folder. done: told after each shard how many were read, and of how many.

    Raises:
        DataError: DATA-010 for a folder that is no store, DATA-186 for one of one file a sample; of what is no damage
            DATA-072 for a file that cannot be read, DATA-158 for a table of a later version.
    """
    recipe = load_recipe(store)
    _check_form(store)
    try:
        catalog = open_catalog(store, recipe.key) if is_sharded(store) else None
    except DataError as error:
        if error.id in NO_DAMAGE:
            raise
        catalog = None  # each shard says of itself what it must be
    present = _present(store)
    numbers = range(catalog.manifest.shards) if catalog is not None else present
    found = []
    for count, number in enumerate(numbers, start=1):
        problems = list(_problems(store, number, catalog, recipe.key, max([*present, *numbers[-1:]]) + 1))
        for problem in problems:
            if problem.id in NO_DAMAGE:
                raise DataError(problem.id, problem.message, problem.remedy)
        if problems:
            found.append(DamagedShard(number, problems))
        done(count, len(numbers))
    return found


def shards_that_lack_clips(store: Path) -> list[int]:
    """The shards from which an extraction left clips out; raises DATA-150 for one without a readable index."""
    found = []
    for number in _present(store):
        about = read_table_header(shard_folder(store, number) / INDEX, KIND, "Run mm data repair on the store.").about
        if about.get("skipped"):
            found.append(number)
    return found


def drop_shards(store: Path, numbers: Sequence[int], drop: Callable[[Path, int], None]) -> None:
    """Drop shards, and first of all what says that the store is finished.

    Args:
        store: its folder. numbers: of the shards. drop: `delete_shard`, or what keeps whole samples of one.
    """
    (store / MANIFEST).unlink(missing_ok=True)
    for number in numbers:
        drop(store, number)


def delete_shard(store: Path, number: int) -> None:
    """Remove a shard."""
    shutil.rmtree(shard_folder(store, number), ignore_errors=True)


def catalog_is_whole(store: Path) -> bool:
    """Test that a store is finished and that its manifest and catalog are in order."""
    try:
        return is_sharded(store) and bool(open_catalog(store, load_recipe(store).key))
    except DataError:
        return False


def _problems(store: Path, number: int, catalog: Catalog | None, recipe_key: str, num_shards: int) -> Iterator[Problem]:
    folder = shard_folder(store, number)
    if not folder.exists():
        yield Problem("DATA-154", f"{folder} is missing.", "Make it again.")
        return
    try:
        if catalog is not None:
            digest, samples, body_bytes = catalog.facts(number)
        else:
            header = read_table_header(folder / INDEX, KIND, "Make the shard again.")
            digest, samples = header.checksum.value, int(header.about.get("samples", -1))
            body_bytes = int(header.about.get("body_bytes", -1))
        shard = open_shard(store, ShardFacts(number, digest, samples, body_bytes, recipe_key, num_shards))
    except DataError as error:
        yield from error.problems
        return
    for blob in shard.blobs():
        try:
            read_blob(blob, str(blob))
        except DataError as error:
            yield from error.problems


def _present(store: Location) -> list[int]:
    return sorted(int(name) for name in names_in(store / SHARDS) if _NUMBER.fullmatch(name))
