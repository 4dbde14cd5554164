"""Export of a store of shards: files that are there whole or not at all, and export.json that says of what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mm.config.base import Section
from mm.config.exports import ExportFormat
from mm.config.storage import Location
from mm.config.tasks.registry import FEATURE_TASKS
from mm.data.exports import parquet, webdataset
from mm.data.exports.samples import ListedSample, listed_samples
from mm.data.files import TEMPORARY_PREFIX, remove_temporaries, write_error
from mm.data.recipe import Recipe
from mm.data.remote.reading import load_section, names_in
from mm.data.remote.writing import new_file, write_bytes
from mm.data.store.catalog import check_shards_are_there
from mm.data.store.copying import finished_store
from mm.data.store.opened import ShardStore
from mm.errors import ConfigError, DataError

NOTE = "export.json"
LISTING = "listing.parquet"


class Note(Section):
    """export.json.

    Attributes:
        version: of the exports. to: the format. recipe, identity: of the store. samples, files: how many there are.
        finished: all files are there.
    """

    version: Literal[1] = 1
    to: ExportFormat
    recipe: str
    identity: str
    samples: int
    files: int
    finished: bool


@dataclass(frozen=True)
class _Part:
    """A file of an export, and the shards that it is of."""

    name: str
    shards: Sequence[int]


def export(source: Location, target: Location, to: ExportFormat, done: Callable[[int, int], None]) -> Note:
    """Write the samples of a store in another format. Killed and started again it writes the files that are missing.

    Args:
        source: the store. target: folder or prefix. to: the format.
        done: told after each shard how many were written, and of how many.

    Raises:
        DataError: DATA-186 for a source that is no finished store of shards, DATA-187 for a target that holds
            something else, what opening the store and reading its samples raises, DATA-018 and DATA-019 where the disk
            refuses; of object storage what `mm.data.remote.client.attempt` raises.
    """
    recipe, catalog = finished_store(source)
    check_shards_are_there(source, catalog.manifest)
    store = ShardStore(source, recipe.key, catalog)
    parts = _parts(to, store.num_shards)
    manifest = catalog.manifest
    note = Note(
        to=to,
        recipe=recipe.key,
        identity=manifest.identity,
        samples=manifest.samples,
        files=len(parts),
        finished=False,
    )
    there = _check_target(target, note)
    if isinstance(target, Path) and target.is_dir():
        remove_temporaries(target)
    _write_note(target, note)
    told = 0
    for part in parts:
        if part.name not in there:
            _write_part(store, recipe, target / part.name, part, to)
        told += len(part.shards)
        done(told, store.num_shards)
    note = note.model_copy(update={"finished": True})
    _write_note(target, note)
    return note


def _parts(to: ExportFormat, num_shards: int) -> list[_Part]:
    if to == "listing":
        return [_Part(LISTING, range(num_shards))]
    suffix = webdataset.SUFFIX if to == "webdataset" else parquet.SUFFIX
    return [_Part(f"{number:06d}{suffix}", [number]) for number in range(num_shards)]


def _check_target(target: Location, note: Note) -> set[str]:
    """Names in a target; raises DATA-187 where they are not of this export."""
    names = {name for name in names_in(target) if not name.startswith(TEMPORARY_PREFIX)}
    if not names:
        return names
    remedy = "Name another place, or empty this one."
    try:
        found = load_section(Note, target / NOTE)
    except ConfigError:
        message = f"{target} is not empty, and has no {NOTE} of an export."
        raise DataError("DATA-187", message, remedy) from None
    if found.model_copy(update={"finished": False}) != note:
        raise DataError("DATA-187", f"{target} holds an export of another store, or in another format.", remedy)
    return names


def _write_note(target: Location, note: Note) -> None:
    write_bytes(target / NOTE, (note.model_dump_json() + "\n").encode())


def _write_part(store: ShardStore, recipe: Recipe, target: Location, part: _Part, to: ExportFormat) -> None:
    def samples() -> Iterator[ListedSample]:
        for number in part.shards:
            yield from listed_samples(store, number)

    with new_file(target) as temporary:
        try:
            if to == "webdataset":
                webdataset.write_tar(temporary, samples(), recipe.key)
            elif to == "parquet":
                names = ["latents", "prompt", "prompt_mask", *(one.name for one in FEATURE_TASKS[recipe.task].stored)]
                parquet.write_samples(temporary, samples(), recipe.key, names)
            else:
                parquet.write_listing(temporary, samples())
        except OSError as error:
            raise write_error(temporary, 0, error) from error
