"""A finished store of shards, open: shards are mapped when they are asked for, the last few stay so."""

from __future__ import annotations

from collections import Counter, OrderedDict

from mm.config.storage import Location
from mm.data.listing import Digest, ListedSample, RowsOfDraw
from mm.data.place import FeaturePlace
from mm.data.store.blobs import Blob
from mm.data.store.catalog import Catalog, check_shards_are_there, open_catalog
from mm.data.store.rows import listed_sample
from mm.data.store.shard import BODY, SHARDS, LatentShape, Shard, ShardFacts, open_shard, shard_folder
from mm.data.store.writer import prompt_key

_MOST_OPEN = 256


class ShardStore:
    """Samples 0, 1, ... of a store of shards. A process holds the catalog's map and at most some hundred shards'."""

    def __init__(self, folder: Location, recipe_key: str, catalog: Catalog) -> None:
        self.folder = folder
        self.recipe_key = recipe_key
        self._catalog = catalog
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self._catalog.manifest.samples

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return self._catalog.manifest.shards

    def first_of(self, shard: int) -> int:
        """Number of a shard's first sample."""
        return self._catalog.first_of(shard)

    def name(self, row: int) -> str:
        """The sample's id; this and all that follow raise what `mm.data.store.shard.open_shard` raises."""
        shard, local = self._find(row)
        return shard.name(local)

    def latent_shape(self, row: int) -> LatentShape:
        """Shape (C, F, H, W) of the sample's latents."""
        shard, local = self._find(row)
        return shard.latent_shape(local)

    def text_tokens(self, row: int) -> int:
        """Tokens of the sample's caption."""
        shard, local = self._find(row)
        return shard.text_tokens(local)

    def listed(self, row: int) -> ListedSample:
        """The sample's video, caption and clip; reads its shard's list up to there.

        Raises:
            DataError: DATA-150 when the list is missing, or has no row of this sample.
        """
        number, local = self._catalog.find(row)
        return listed_sample(self.folder, number, local, self.name(row))

    def file_of(self, row: int) -> str:
        """The body that holds the sample, below the folder."""
        number, _ = self._catalog.find(row)
        return f"{SHARDS}/{shard_folder(self.folder, number).name}/{BODY}"

    def place(self, row: int) -> FeaturePlace:
        """Place of the sample."""
        shape, name = self.latent_shape(row), self.name(row)
        return FeaturePlace(self.folder, self.file_of(row), name, self.recipe_key, shape, self.blobs_of(row))

    def blobs_of(self, row: int) -> tuple[Blob, Blob]:
        """Places of the sample and of its caption's embedding."""
        shard, local = self._find(row)
        number, key = shard.prompt_of(local)
        return shard.blob(local), self.shard(number).prompt(key)

    def empty_prompt(self) -> Blob | None:
        """Place of the empty caption's embedding, in the first shard; None in a store that was made without."""
        return self.shard(0).find_prompt(prompt_key(""))

    @property
    def draws(self) -> int:
        """Draws of each sample, one after the other in the store."""
        return self._catalog.manifest.draws

    def of_draw(self, draw: int) -> RowsOfDraw:
        """The rows of one draw."""
        begin, end = (self.num_shards * one // self.draws for one in (draw, draw + 1))
        before = self._catalog.shapes_before(begin)
        counts = self._catalog.shapes_before(end) - before  # without those of which there are none
        first = len(self) * draw // self.draws
        count = len(self) // self.draws
        return RowsOfDraw(first, count, counts, lambda shape, k: self.in_bucket(shape, before[shape] + k))

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples with each latent shape, in the order of the shapes' first samples."""
        return self._catalog.shapes()

    def in_bucket(self, shape: LatentShape, k: int) -> int:
        """Row of the k-th sample of a shape, of which there are more than k."""
        number, place = self._catalog.in_bucket(shape, k)
        return self._catalog.first_of(number) + self.shard(number).in_bucket(shape, place)

    def add_identity(self, digest: Digest) -> None:
        """Feed the names, clips, captions and videos of all samples to a digest."""
        digest.update(f"{self._catalog.manifest.identity}\n".encode())

    def shard(self, number: int) -> Shard:
        """A shard, mapped and checked."""
        found = self._shards.get(number)
        if found is None:
            digest, samples, body_bytes = self._catalog.facts(number)
            facts = ShardFacts(number, digest, samples, body_bytes, self.recipe_key, self.num_shards)
            found = self._shards[number] = open_shard(self.folder, facts)
            if len(self._shards) > _MOST_OPEN:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return found

    def _find(self, row: int) -> tuple[Shard, int]:
        number, local = self._catalog.find(row)
        return self.shard(number), local


def open_shards(folder: Location, recipe_key: str) -> ShardStore:
    """Open a store of shards: its manifest, its catalog, and whether all shards are there.

    Raises:
        DataError: what `open_catalog` and `check_shards_are_there` raise.
    """
    catalog = open_catalog(folder, recipe_key)
    check_shards_are_there(folder, catalog.manifest)
    return ShardStore(folder, recipe_key, catalog)
