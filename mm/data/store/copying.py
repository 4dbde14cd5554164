"""A store of shards in another place, to and from object storage, every byte compared with its checksum."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from mm.config.storage import Location, Remote
from mm.data.files import TEMPORARY_PREFIX, make_folder, remove_temporaries, sync_folder, write_error
from mm.data.recipe import RECIPE_FILE, Recipe, load_recipe
from mm.data.remote.reading import download, names_in, read_bytes
from mm.data.remote.writing import deliver, room_for, write_bytes
from mm.data.store.blobs import REMEDY, read_blob
from mm.data.store.captions import CAPTIONS
from mm.data.store.catalog import MANIFEST, Catalog, Manifest, is_sharded, open_catalog
from mm.data.store.shard import BODY, INDEX, KIND, LISTING, SHARDS, ShardFacts, open_shard, shard_folder
from mm.data.store.table import read_table_header
from mm.errors import DataError

_FILES = (BODY, LISTING, INDEX)  # in object storage, where none is renamed, the last one says that a shard is whole


def copy_store(source: Location, target: Location, done: Callable[[int, int], None]) -> Manifest:
    """Copy a finished store of shards. It may be killed and started again: shards that are there are kept.

    Args:
        source: the store. target: folder or prefix of the new one.
        done: told after each shard how many are there, and of how many.

    Raises:
        DataError: DATA-186 for a source that is no finished store of shards, DATA-068 for a target that holds
            something else, what opening the source and reading its blobs raises, DATA-018 and DATA-019 where the disk
            refuses; of object storage what `mm.data.remote.client.attempt` raises.
    """
    recipe, catalog = finished_store(source)
    manifest = catalog.manifest
    _check_target(source, target, manifest)
    if isinstance(target, Path):
        make_folder(target / SHARDS, "the target")
        remove_temporaries(target)
        remove_temporaries(target / SHARDS)
    write_bytes(target / RECIPE_FILE, read_bytes(source / RECIPE_FILE))
    for number in range(manifest.shards):
        digest, samples, body_bytes = catalog.facts(number)
        facts = ShardFacts(number, digest, samples, body_bytes, recipe.key, manifest.shards)
        if not _is_there(target, facts):
            _copy_shard(source, target, facts)
        done(number + 1, manifest.shards)
    for name in sorted(names_in(source / CAPTIONS)):
        write_bytes(target / CAPTIONS / name, read_bytes(source / CAPTIONS / name))
    for name in (manifest.catalog, MANIFEST):
        write_bytes(target / name, read_bytes(source / name))
    open_catalog(target, recipe.key)
    return manifest


def finished_store(store: Location) -> tuple[Recipe, Catalog]:
    """The recipe and the catalog of a store that must be one of shards, and finished.

    Raises:
        DataError: DATA-186 where it is not, and what `load_recipe` and `open_catalog` raise.
    """
    recipe = load_recipe(store)
    if not is_sharded(store):
        remedy = "Finish it first; mm migrate shards makes one of a store of one file a sample."
        raise DataError("DATA-186", f"{store} is no finished store of shards.", remedy)
    return recipe, open_catalog(store, recipe.key)


def _check_target(source: Location, target: Location, manifest: Manifest) -> None:
    """Refuse a target that holds anything but a part of the same store."""
    names = {name for name in names_in(target) if not name.startswith(TEMPORARY_PREFIX)}
    strange = names - {RECIPE_FILE, MANIFEST, SHARDS, CAPTIONS, manifest.catalog}
    same = all(read_bytes(target / name) == read_bytes(source / name) for name in names & {RECIPE_FILE, MANIFEST})
    if strange or not same or (names and RECIPE_FILE not in names):
        found = f"{target} holds {', '.join(sorted(strange))}" if strange else f"{target} holds another store"
        raise DataError("DATA-068", f"{found}, and not a part of {source}.", "Name another place.")


def _is_there(target: Location, facts: ShardFacts) -> bool:
    """Test that a shard was copied before.

    Raises:
        DataError: DATA-068 where it is another one.
    """
    folder = shard_folder(target, facts.number)
    if INDEX not in names_in(folder):
        return False
    if read_table_header(folder / INDEX, KIND, REMEDY).checksum.value != facts.digest:
        raise DataError("DATA-068", f"{folder} is a shard of another store.", "Name another place.")
    return True


def _copy_shard(source: Location, target: Location, facts: ShardFacts) -> None:
    """Copy a shard, whole: first to a folder of its own, unless it is to be read where it is."""
    folder = shard_folder(target, facts.number)
    with room_for(folder) as room, TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=room) as temporary:
        stage: Path = Path(temporary)
        if isinstance(source, Path) and isinstance(target, Remote):
            stage = source
        else:
            _fetch(source, stage, facts)
        for blob in open_shard(stage, facts).blobs():
            read_blob(blob, str(blob))
        staged = shard_folder(stage, facts.number)
        if isinstance(folder, Remote):
            for name in _FILES:
                deliver(staged / name, folder / name)
        else:
            _rename(staged, folder)


def _fetch(source: Location, stage: Path, facts: ShardFacts) -> None:
    here, there = shard_folder(stage, facts.number), shard_folder(source, facts.number)
    make_folder(here, "the target")
    for name in _FILES:
        place = there / name
        try:
            if isinstance(place, Path):
                shutil.copyfile(place, here / name)
            else:
                download(place, here / name)
        except FileNotFoundError:
            raise DataError("DATA-154", f"{place} is missing.", REMEDY) from None
        except OSError as error:
            raise write_error(here / name, facts.body_bytes, error) from error


def _rename(staged: Path, folder: Path) -> None:
    try:
        for path in staged.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.rename(staged, folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise write_error(folder, 0, error) from error
