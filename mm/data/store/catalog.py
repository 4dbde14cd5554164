"""Manifest and catalog of a store: counts and checksums of all shards, and how many samples of each shape they hold.

manifest.json names the catalog, a table whose columns have one record a shard, or one for each shape that a shard
holds; both are made from the headers of the shards' indexes, so that finishing a store looks at no sample.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from pydantic import Field

from mm.config.base import Section
from mm.config.storage import Location
from mm.data.files import TEMPORARY_PREFIX, write_atomically
from mm.data.remote.reading import exists, load_section, names_in
from mm.data.store.blobs import REMEDY
from mm.data.store.checksum import DIGEST_BYTES
from mm.data.store.shard import INDEX, KIND, SHARDS, LatentShape, shard_folder
from mm.data.store.table import Column, TableHeader, open_table, read_table_header, write_table
from mm.errors import ConfigError, DataError

MANIFEST = "manifest.json"
CATALOG_KIND = "store catalog"
FINISH = "Run mm data repair on the store, then what wrote it (mm migrate shards), which finishes it again."


class Manifest(Section):
    """manifest.json.

    Attributes:
        version: of this format. recipe: key of the store's recipe.
        samples, shards: how many there are.
        shapes: [C, F, H, W, samples of that shape] of each latent shape.
        catalog: file name; its checksum is part of it.
        identity: sixteen hexadecimal digits or more of all samples in their order.
        draws: of each sample; those of the first draw come first, then those of the second.
    """

    version: int = Field(1, ge=1, le=1)
    recipe: str
    samples: int = Field(ge=0)
    shards: int = Field(ge=0)
    shapes: tuple[tuple[int, int, int, int, int], ...]
    catalog: str = Field(pattern=r"^catalog-[0-9a-f]{32}\.bin$")
    identity: str
    draws: int = Field(1, ge=1)


class Catalog:
    """The catalog of a finished store, open."""

    def __init__(self, manifest: Manifest, columns: dict[str, Column]) -> None:
        self.manifest = manifest
        self._first = columns["first"]
        self._digests = columns["digests"]
        self._body_bytes = columns["body_bytes"]
        self._bucket_begins = columns["bucket_begins"]
        self._bucket_shards = columns["bucket_shards"]
        self._bucket_firsts = columns["bucket_firsts"]
        self._bucket_of = {shape: number for number, shape in enumerate(self.shapes())}

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples of each shape, in the order of the shapes' first samples."""
        return Counter({(c, f, h, w): count for c, f, h, w, count in self.manifest.shapes})

    def find(self, sample: int) -> tuple[int, int]:
        """The shard that holds a sample, and the sample's number in it."""
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        return shard, sample - int(self._first[shard])

    def first_of(self, shard: int) -> int:
        """Number in the store of a shard's first sample."""
        return int(self._first[shard])

    def facts(self, shard: int) -> tuple[bytes, int, int]:
        """Checksum of a shard's index, its number of samples, and the size of its body in bytes."""
        count = int(self._first[shard + 1]) - int(self._first[shard])
        return bytes(self._digests[shard]), count, int(self._body_bytes[shard])

    def shapes_before(self, shard: int) -> Counter[LatentShape]:
        """Number of samples of each shape in the shards before one."""
        counts = Counter[LatentShape]()
        for shape, held in self.shapes().items():
            bucket = self._bucket_of[shape]
            begin, end = int(self._bucket_begins[bucket]), int(self._bucket_begins[bucket + 1])
            place = begin + int(np.searchsorted(self._bucket_shards[begin:end], shard))
            counts[shape] = int(self._bucket_firsts[place]) if place < end else held
        return counts

    def in_bucket(self, shape: LatentShape, k: int) -> tuple[int, int]:
        """The shard that holds the k-th sample of a shape, and which sample of that shape it is there."""
        bucket = self._bucket_of[shape]
        begin, end = int(self._bucket_begins[bucket]), int(self._bucket_begins[bucket + 1])
        firsts = self._bucket_firsts[begin:end]
        number = int(np.searchsorted(firsts, k, side="right")) - 1
        return int(self._bucket_shards[begin + number]), k - int(firsts[number])


def is_sharded(store: Location) -> bool:
    """Tell whether a store consists of shards and is finished."""
    return exists(store / MANIFEST)


def holds_shards(folder: Path) -> bool:
    """Tell whether a folder has shards, of a store that is finished or not."""
    return is_sharded(folder) or (folder / SHARDS).is_dir()


def read_manifest(store: Location) -> Manifest:
    """Read the manifest.

    Raises:
        DataError: DATA-156 for one that cannot be read.
    """
    try:
        return load_section(Manifest, store / MANIFEST)
    except ConfigError as error:
        raise DataError("DATA-156", error.problems[0].message, FINISH) from None


def open_catalog(store: Location, recipe_key: str) -> Catalog:
    """Read the manifest and map the catalog.

    Raises:
        DataError: DATA-156 for a manifest that cannot be read or does not fit its catalog, DATA-150 for a catalog that
            is missing or damaged, DATA-155 when they are of another recipe than the store.
    """
    manifest = read_manifest(store)
    if manifest.recipe != recipe_key:
        message = f"{store / MANIFEST} is of the recipe {manifest.recipe}, {store} of {recipe_key}."
        raise DataError("DATA-155", message, FINISH)
    digest = bytes.fromhex(manifest.catalog[len("catalog-") : -len(".bin")])
    table = open_table(store / manifest.catalog, CATALOG_KIND, FINISH, digest)
    columns = dict(table.columns)
    try:
        fits = _fits(manifest, columns) and table.header.about in ({}, _said_twice(manifest))
    except (KeyError, IndexError, ValueError) as error:
        raise DataError("DATA-156", f"{store / manifest.catalog} lacks a part ({error}).", FINISH) from None
    if not fits:
        message = f"{store / MANIFEST} and its catalog contradict each other in what they count."
        raise DataError("DATA-156", message, FINISH)
    return Catalog(manifest, columns)


def finish_store(store: Path, num_shards: int, recipe_key: str, draws: int = 1) -> Manifest:
    """Write the catalog and the manifest of a store whose shards are all there.

    Args:
        store: its folder. num_shards: how many there are. recipe_key: of the store. draws: of each sample.

    Raises:
        DataError: DATA-150 for a shard that is missing or no shard, DATA-151 for one whose index contradicts itself,
            DATA-155 for one of another recipe, DATA-018 and DATA-019 when writing fails.
    """
    headers = [_shard_header(store, number, recipe_key) for number in range(num_shards)]
    buckets: dict[LatentShape, list[tuple[int, int]]] = {}
    counts: Counter[LatentShape] = Counter()
    for number, header in enumerate(headers):
        for channels, frames, height, width, count in header.about["shapes"]:
            shape = channels, frames, height, width
            buckets.setdefault(shape, []).append((number, counts[shape]))
            counts[shape] += count
    pairs = np.array([pair for found in buckets.values() for pair in found], np.uint64).reshape(-1, 2)
    columns = {
        "first": np.cumsum([0, *(header.about["samples"] for header in headers)], dtype="<u8"),
        "digests": np.frombuffer(b"".join(h.checksum.value for h in headers), np.uint8).reshape(-1, DIGEST_BYTES),
        "body_bytes": np.array([header.about["body_bytes"] for header in headers], "<u8"),
        "bucket_begins": np.cumsum([0, *map(len, buckets.values())], dtype="<u8"),
        "bucket_shards": pairs[:, 0].astype("<u4"),
        "bucket_firsts": pairs[:, 1].astype("<u8"),
    }
    identity = blake2b(digest_size=DIGEST_BYTES)
    for header in headers:
        identity.update(bytes.fromhex(header.about["identity"]))
    manifest = Manifest(
        recipe=recipe_key,
        samples=int(columns["first"][-1]),
        shards=num_shards,
        shapes=tuple((*shape, count) for shape, count in counts.items()),
        catalog="catalog-" + "0" * 32 + ".bin",  # until its content is known, which is its name
        identity=identity.hexdigest(),
        draws=draws,
    )
    temporary = store / f"{TEMPORARY_PREFIX}catalog-{uuid4().hex[:12]}"
    digest = write_table(temporary, CATALOG_KIND, _said_twice(manifest), columns)
    catalog = f"catalog-{digest.hex()}.bin"
    os.replace(temporary, store / catalog)
    manifest = manifest.model_copy(update={"catalog": catalog})
    content = (manifest.model_dump_json(exclude_defaults=True) + "\n").encode()
    write_atomically(store / MANIFEST, [content], len(content))
    for other in store.glob("catalog-*.bin"):
        if other.name != catalog:
            other.unlink(missing_ok=True)
    return manifest


def check_shards_are_there(store: Location, manifest: Manifest) -> None:
    """Look for the folder of every shard, with one listing.

    Raises:
        DataError: DATA-154 with how many are missing and the first of them.
    """
    present = set(names_in(store / SHARDS))
    missing = [number for number in range(manifest.shards) if f"{number:08d}" not in present]
    if missing:
        first = shard_folder(store, missing[0])
        message = f"{len(missing)} of {manifest.shards} shards are missing, the first is {first}."
        raise DataError("DATA-154", message, REMEDY)


def _shard_header(store: Path, number: int, recipe_key: str) -> TableHeader:
    path = shard_folder(store, number) / INDEX
    header = read_table_header(path, KIND, REMEDY)
    if header.about.get("recipe") != recipe_key:
        message = f"{path} is of the recipe {header.about.get('recipe')}, its store of {recipe_key}."
        raise DataError("DATA-155", message, REMEDY)
    if sum(shape[4] for shape in header.about["shapes"]) != header.about["samples"]:
        message = f"{path}: it says {header.about['samples']} samples, and its shapes are those of another number."
        raise DataError("DATA-151", message, REMEDY)
    return header


def _said_twice(manifest: Manifest) -> dict[str, Any]:
    """Values of the manifest as they stand in the catalog, whose checksum proves them; catalogs of before have none."""
    found: dict[str, Any] = json.loads(manifest.model_dump_json(exclude={"version", "catalog"}))
    return found


def _fits(manifest: Manifest, columns: dict[str, Column]) -> bool:
    """Compare the counts of a manifest with its catalog's, by their ends: no column is read whole."""
    lengths = [len(columns[name]) for name in ("first", "digests", "body_bytes", "bucket_begins", "bucket_shards")]
    pairs = lengths[-1]
    expected = [manifest.shards + 1, manifest.shards, manifest.shards, len(manifest.shapes) + 1, pairs]
    ends: Sequence[Any] = (columns["first"][-1], columns["bucket_begins"][-1], len(columns["bucket_firsts"]))
    counted = sum(shape[4] for shape in manifest.shapes)
    return (
        lengths == expected
        and tuple(map(int, ends)) == (manifest.samples, pairs, pairs)
        and counted == manifest.samples
    )
