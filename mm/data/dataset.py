"""The features of one or more stores as one data set."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

from mm.config.data import StoreSource, store_sources
from mm.config.model import WanConfig
from mm.config.run.data import FeatureSet
from mm.config.storage import Location, Remote
from mm.config.tasks.registry import FEATURE_TASKS
from mm.data.features import EMPTY_PROMPT_ID, LISTING, OTHER_TASK, Feature, read_feature
from mm.data.files import path_below
from mm.data.listing import FeatureStore, LatentShape, ListedSample, RowsOfDraw, open_feature_store
from mm.data.open_store import MakingStore, SampleTensors, Store
from mm.data.place import ClipPlace, FeaturePlace, Place
from mm.data.recipe import Recipe, check_recipe, expected_in_training, load_recipe
from mm.data.store.blobs import Blob, read_prompt_blob, read_sample_blobs
from mm.data.store.catalog import is_sharded
from mm.data.store.opened import ShardStore, open_shards
from mm.errors import ConfigError, DataError, Problem, raise_all

if TYPE_CHECKING:  # libraries that decode, which few trainings need
    from mm.data.clips import Clip

ENCODER_FIELDS = ("vae", "text_encoder", "tokenizer", "text_cleaning", "crop", "image_encoder")


class FeatureItem(SampleTensors):
    """One sample: its tensors, and its index in the data set."""

    sample: int


def read_sample(place: FeaturePlace, model: WanConfig) -> SampleTensors:
    """Read one sample.

    Raises:
        DataError: what `mm.data.features.read_feature` or, of shards, `mm.data.store.blobs.read_sample_blobs` raises,
            DATA-012 when the latents are not as listed.
    """
    origin = place.sample, place.recipe_key
    if place.blobs is not None:
        file: Path | Blob = place.blobs[0]
        feature = read_sample_blobs(*place.blobs, model, origin)
    else:
        assert isinstance(place.folder, Path)  # noqa: S101  stores of one file a sample are local
        file = path_below(place.folder, place.file, str(place.folder / LISTING))
        feature = read_feature(file, model, origin)
    return as_listed(feature, place, str(file))


def as_listed(feature: Feature, place: Place, where: str) -> SampleTensors:
    """The tensors of a sample; `where` names it in the message.

    Raises:
        DataError: DATA-012 when the latents are not of the shape that is listed.
    """
    if feature.latents is None or tuple(feature.latents.shape) != place.latent_shape:
        found = None if feature.latents is None else list(feature.latents.shape)
        message = f"{where}: latents are {found}, {place.folder} lists {list(place.latent_shape)}."
        raise DataError("DATA-012", message, "Run feature extraction again.")
    return {"latents": feature.latents, "prompt": feature.prompt, "features": dict(feature.features)}


def read_empty_prompt(file: Path | Blob, recipe_key: str, model: WanConfig) -> Tensor:
    """The empty caption's embedding, [L, D]; raises what `read_sample` raises."""
    if isinstance(file, Blob):
        return read_prompt_blob(file, model, recipe_key)
    return read_feature(file, model, (EMPTY_PROMPT_ID, recipe_key)).prompt


class FeatureDataset(Dataset[FeatureItem]):
    """All samples of some stores, in the order of their listings, told by their index 0, 1, ....

    Reading checks each sample against the model. Samples of one latent shape form a bucket.
    """

    def __init__(
        self, stores: Sequence[Store], model: WanConfig, made: Mapping[Location, MakingStore] | None = None
    ) -> None:
        """Take stores, and by their folders those of them whose features are made when they are asked for."""
        self._stores = stores
        self._made = made or {}
        self.model = model
        self._first = list(accumulate((len(store) for store in stores), initial=0))  # index of each store's first

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> FeatureItem:
        """Read one sample; raises what `stored_place` and `read_sample` raise."""
        return {**read_sample(self.stored_place(index), self.model), "sample": index}

    def name(self, index: int) -> str:
        """Stable name of a sample, the key of its random numbers; of the stores after the first it begins with `N:`."""
        store, row = self._find(index)
        return (f"{store}:" if store else "") + self._stores[store].name(row)

    def latent_shape(self, index: int) -> LatentShape:
        """Shape (C, F, H, W) of a sample's latents."""
        store, row = self._find(index)
        return self._stores[store].latent_shape(row)

    def num_tokens(self, index: int) -> int:
        """Transformer tokens of a sample."""
        return self.tokens_of(self.latent_shape(index))

    def tokens_of(self, shape: LatentShape) -> int:
        """Transformer tokens of latents of a shape (C, F, H, W), those in front of the video's too."""
        _, frames, height, width = shape
        return self.model.num_tokens((frames, height, width))

    def token_counts(self) -> set[int]:
        """The numbers of transformer tokens that samples have."""
        return {self.tokens_of(shape) for shape in self.shapes()}

    def text_tokens(self, index: int) -> int:
        """Tokens of a sample's caption."""
        store, row = self._find(index)
        return self._stores[store].text_tokens(row)

    def listed(self, index: int) -> ListedSample:
        """A sample's video, caption and clip as listed; of shards raises what `ShardStore.listed` does."""
        store, row = self._find(index)
        return self._stores[store].listed(row)

    def place(self, index: int) -> Place:
        """Place of one sample."""
        store, row = self._find(index)
        return self._stores[store].place(row)

    def stored_place(self, index: int) -> FeaturePlace:
        """Place of one sample's features; raises KeyError where they are not made yet."""
        place = self.place(index)
        if isinstance(place, ClipPlace):
            raise KeyError(f"the features of {self.name(index)} are not made yet")
        return place

    def place_again(self, index: int, lost: Place) -> Place | None:
        """Another place of a sample whose features cannot be read from one; None where there is none."""
        store, row = self._find(index)
        making = self._made.get(self._stores[store].folder)
        return None if making is None else making.place_again(row, lost)

    def make(self, place: ClipPlace, clip: Clip) -> SampleTensors:
        """Features of a clip."""
        return self._made[place.folder].make(place, clip, self.model)

    @property
    def clip_bytes(self) -> int:
        """The most bytes that pixels of a clip take whose features are yet to be made; 0 where there are none."""
        return max((store.clip_bytes for store in self._made.values()), default=0)

    def shapes(self) -> Counter[LatentShape]:
        """Number of samples with each latent shape, in the order of the shapes' first samples."""
        return sum((store.shapes() for store in self._stores), Counter[LatentShape]())

    def buckets(self) -> dict[LatentShape, int]:
        """Number of samples with each latent shape, in the order of the shapes."""
        return dict(sorted(self.shapes().items()))

    def with_model(self, model: WanConfig) -> FeatureDataset:
        """The same samples for another model."""
        return FeatureDataset(self._stores, model, self._made)

    @property
    def draws(self) -> int:
        """Draws of each sample, after which all stores begin again with their first."""
        return lcm(*(store.draws for store in self._stores))

    def of_draw(self, draw: int) -> DatasetDraw:
        """The samples of one draw; a store that has fewer begins again with its first."""
        rows = [store.of_draw(draw % store.draws) for store in self._stores]
        return DatasetDraw(list(zip(self._first, rows, strict=False)))

    def parts(self) -> Iterator[tuple[Location, int, FeatureDataset]]:
        """Each store's folder, the index of its first sample here, and a data set of it alone."""
        for first, store in zip(self._first, self._stores, strict=False):
            yield store.folder, first, FeatureDataset([store], self.model, self._made)

    def _find(self, index: int) -> tuple[int, int]:
        """A sample's store and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)}")
        store = bisect_right(self._first, index) - 1
        return store, index - self._first[store]

    def empty_prompt_file(self) -> tuple[Path | Blob, str]:
        """Place of the empty caption's embedding, and the recipe it must be of.

        Raises:
            DataError: DATA-016 when the first store has none, and what opening its first shard raises.
        """
        store = self._stores[0]
        place = store.empty_prompt()
        if place is None or (isinstance(place, Path) and not place.exists()):
            found = f"{store.folder} holds no empty caption" if place is None else f"{place} does not exist"
            message = f"{found}, and captions are to be dropped (cfg above 0)."
            raise DataError("DATA-016", message, "Run feature extraction again, or set cfg to 0.")
        return place, store.recipe_key

    def empty_prompt(self) -> Tensor:
        """The empty caption's embedding, [L, D].

        Raises:
            DataError: what `empty_prompt_file` and `read_empty_prompt` raise.
        """
        return read_empty_prompt(*self.empty_prompt_file(), self.model)

    def identity(self) -> str:
        """Sixteen hexadecimal digits of the samples in their order: their names, clips, captions, videos and recipes.

        Two data sets with one identity give the same run; where they lie and in which files does not matter.
        """
        digest = hashlib.sha256()
        for store in self._stores:
            digest.update(f"{store.recipe_key}\n".encode())
            store.add_identity(digest)
        return digest.hexdigest()[:16]


class DatasetDraw:
    """Samples of a data set, one draw of each."""

    def __init__(self, rows: Sequence[tuple[int, RowsOfDraw]]) -> None:
        """Take the rows of each store, and the index of its first row in the data set."""
        self._rows = rows
        self._first = list(accumulate((part.count for _, part in rows), initial=0))

    def __len__(self) -> int:
        return self._first[-1]

    def buckets(self) -> dict[LatentShape, int]:
        """Number of samples with each latent shape, in the order of the shapes."""
        return dict(sorted(sum((part.shapes for _, part in self._rows), Counter[LatentShape]()).items()))

    def member(self, k: int) -> int:
        """Index in the data set of the k-th sample."""
        store = bisect_right(self._first, k) - 1
        first, part = self._rows[store]
        return first + part.first + k - self._first[store]

    def in_bucket(self, shape: LatentShape, k: int) -> int:
        """Index in the data set of the k-th sample of a latent shape.

        Raises:
            IndexError: there are not so many.
        """
        rest = k
        for first, part in self._rows:
            held = part.shapes[shape]
            if 0 <= rest < held:
                return first + part.in_bucket(shape, rest)
            rest -= held
        raise IndexError(f"there is no sample {k} of latents {list(shape)}")


def open_features(
    features: FeatureSet, model: WanConfig, made: Mapping[Location, MakingStore] | None = None
) -> FeatureDataset:
    """Open the stores that a set names.

    Args:
        features: the set. model: that is to take them.
        made: by their folders those of the stores whose features are made when they are asked for.

    Raises:
        ConfigError, DataError: what `checked_sources` raises.
        DataError: DATA-010, DATA-011 or DATA-064 for a store that is incomplete, DATA-046 for a sample of another task
            than its store; of shards what `mm.data.store.opened.open_shards` raises.
    """
    given = made or {}
    stores = [
        given.get(source.folder) or _opened(source, recipe) for source, recipe in checked_sources(features, model)
    ]
    return FeatureDataset(stores, model, given)


def _opened(source: StoreSource, recipe: Recipe) -> FeatureStore | ShardStore:
    if is_sharded(source.folder):
        return open_shards(source.folder, recipe.key)
    return open_feature_store(*local_store(source), recipe.key, recipe.task)


def local_store(source: StoreSource) -> tuple[Path, Path]:
    """Folder and listing of a store of one file a sample.

    Raises:
        DataError: DATA-186 where it is in object storage.
    """
    if isinstance(source.folder, Remote) or source.annotation is None:
        message = f"{source.folder} is no finished store of shards, as stores in object storage are."
        remedy = "Copy one there with mm data copy; mm migrate shards makes one of a store of one file a sample."
        raise DataError("DATA-186", message, remedy)
    return source.folder, source.annotation


def sources_of_set(features: FeatureSet) -> list[StoreSource]:
    """The stores that a set names; raises what `mm.config.data.store_sources` raises."""
    return store_sources(features.path, features.folder, LISTING, features.storage)


def checked_sources(features: FeatureSet, model: WanConfig) -> list[tuple[StoreSource, Recipe]]:
    """The stores that a set names, with their recipes, before any listing is read.

    Raises:
        ConfigError: what `mm.config.data.store_sources` raises, CFG-203 for a list that is named twice.
        DataError: DATA-010 for a folder that is no store, DATA-014 when its recipe is not what the set says,
            or when two stores were made with different encoders, DATA-046 when a store is of another task than the
            model.
    """
    expected = expected_in_training(features)
    found: list[tuple[StoreSource, Recipe]] = []
    sources = sources_of_set(features)
    _check_named_once(sources)
    for source in sources:
        recipe = load_recipe(source.folder)
        if FEATURE_TASKS[recipe.task].trains != model.task.name:
            message = f"The features in {source.folder} are of the task {recipe.task}, the model is {model.task.name}."
            raise DataError("DATA-046", message, OTHER_TASK)
        remedy = "Correct preprocess_parameters or tokenizer_config, or extract the features again with these values."
        check_recipe(source.folder, recipe, expected, remedy)
        first = found[0][1] if found else recipe
        encoders = {name: getattr(first, name) for name in ENCODER_FIELDS}
        check_recipe(source.folder, recipe, encoders, "Extract all data sets with the same weights as the first.")
        found.append((source, recipe))
    return found


def _check_named_once(sources: Sequence[StoreSource]) -> None:
    """Refuse a list of samples that is named twice, however its path is written: each would come twice an epoch.

    Raises:
        ConfigError: CFG-203.
    """
    named = Counter((_real(source.folder), _real(source.annotation)) for source in sources)
    remedy = "Name it once; to take it more often, give it a share with repeats or a weight (data.mixture.shares)."
    problems = [
        Problem("CFG-203", f"The features name {folder} {'twice' if count == 2 else f'{count} times'}.", remedy)
        for (folder, _), count in named.items()
        if count > 1
    ]
    raise_all(ConfigError, problems)


def _real(place: Location | None) -> str:
    return os.path.realpath(place) if isinstance(place, Path) else str(place)
