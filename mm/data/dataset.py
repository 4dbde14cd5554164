"""The features of one or more stores as one data set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from mm.config.data import DataSource, data_sources
from mm.config.model import WanConfig
from mm.config.run.data import FeatureSet
from mm.data.features import EMPTY_PROMPT_ID, LISTING, OTHER_TASK, read_feature
from mm.data.files import path_below
from mm.data.listing import FeatureStore, open_feature_store
from mm.data.recipe import Recipe, check_recipe, expected_in_training, load_recipe
from mm.errors import DataError

ENCODER_FIELDS = ("vae", "text_encoder", "tokenizer", "text_cleaning", "crop", "image_encoder")


class SampleTensors(TypedDict):
    """Tensors that a feature file gives training: latents [16, F, H, W], prompt [L, D], the task's features by name."""

    latents: Tensor
    prompt: Tensor
    features: dict[str, Tensor]


class FeatureItem(SampleTensors):
    """One sample: its tensors, and its index in the data set."""

    sample: int


@dataclass(frozen=True, slots=True)
class FeatureSample:
    """One sample as listed.

    Attributes:
        id: stable name, the key of its random numbers; samples of the stores after the first begin with `N:`.
        latent_shape: (C, F, H, W). num_tokens: transformer tokens.
        store, row: where it is.
    """

    id: str
    latent_shape: tuple[int, int, int, int]
    num_tokens: int
    store: int
    row: int


@dataclass(frozen=True, slots=True)
class FeaturePlace:
    """All that is needed to read one sample, small enough to be sent to another process.

    Attributes:
        folder, file: the store and the file below it.
        sample, recipe_key: what the file must say of itself.
        latent_shape: as listed.
    """

    folder: Path
    file: str
    sample: str
    recipe_key: str
    latent_shape: tuple[int, int, int, int]


def read_sample(place: FeaturePlace, model: WanConfig) -> SampleTensors:
    """Read one sample.

    Raises:
        DataError: what `mm.data.features.read_feature` raises, DATA-012 when the latents are not as listed.
    """
    listing = place.folder / LISTING
    file = path_below(place.folder, place.file, str(listing))
    feature = read_feature(file, model, (place.sample, place.recipe_key))
    if feature.latents is None or tuple(feature.latents.shape) != place.latent_shape:
        found = None if feature.latents is None else list(feature.latents.shape)
        message = f"{file}: latents are {found}, {listing} lists {list(place.latent_shape)}."
        raise DataError("DATA-012", message, "Run feature extraction again.")
    return {"latents": feature.latents, "prompt": feature.prompt, "features": dict(feature.features)}


def read_empty_prompt(file: Path, recipe_key: str, model: WanConfig) -> Tensor:
    """The empty caption's embedding, [L, D]; raises what `mm.data.features.read_feature` raises."""
    return read_feature(file, model, (EMPTY_PROMPT_ID, recipe_key)).prompt


class FeatureDataset(Dataset[FeatureItem]):
    """All samples of some stores, in the order of their listings. Reading checks each sample against the model."""

    def __init__(self, stores: Sequence[FeatureStore], model: WanConfig) -> None:
        self._stores = stores
        self.model = model
        self.samples: list[FeatureSample] = []
        for store_index, store in enumerate(stores):
            prefix = f"{store_index}:" if store_index else ""
            for row_index, row in enumerate(store.rows):
                num_tokens = prod(row.latent_shape[1:]) // prod(model.patch_size)
                sample = FeatureSample(prefix + row.sample, row.latent_shape, num_tokens, store_index, row_index)
                self.samples.append(sample)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> FeatureItem:
        """Read one sample; raises what `read_sample` raises."""
        return {**read_sample(self.place(index), self.model), "sample": index}

    def place(self, index: int) -> FeaturePlace:
        """Place of one sample in its store."""
        sample = self.samples[index]
        store = self._stores[sample.store]
        row = store.rows[sample.row]
        return FeaturePlace(store.folder, row.file, row.sample, store.recipe_key, sample.latent_shape)

    def empty_prompt_file(self) -> tuple[Path, str]:
        """The file of the empty caption's embedding, and the recipe it must be of.

        Raises:
            DataError: DATA-016 when the first store has none.
        """
        store = self._stores[0]
        if not store.empty_prompt.exists():
            message = f"{store.empty_prompt} does not exist, and captions are to be dropped (cfg above 0)."
            raise DataError("DATA-016", message, "Run feature extraction again, or set cfg to 0.")
        return store.empty_prompt, store.recipe_key

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
            for row in store.rows:
                content = (row.sample, row.cap, row.start_frame_idx, row.latent_shape, row.text_tokens, row.video)
                digest.update(f"{json.dumps(content)}\n".encode())
        return digest.hexdigest()[:16]

    def shapes(self) -> Counter[tuple[int, int, int, int]]:
        """Number of samples with each latent shape."""
        return Counter(sample.latent_shape for sample in self.samples)


def open_features(features: FeatureSet, model: WanConfig) -> FeatureDataset:
    """Open the stores that a set names.

    Raises:
        ConfigError, DataError: what `checked_sources` raises.
        DataError: DATA-010, DATA-011 or DATA-064 for a store that is incomplete, DATA-046 for a sample of another task
            than its store.
    """
    sources = checked_sources(features, model)
    stores = [
        open_feature_store(source.folder, source.annotation, recipe.key, recipe.task) for source, recipe in sources
    ]
    return FeatureDataset(stores, model)


def _sources(features: FeatureSet) -> list[DataSource]:
    return data_sources(features.path, features.folder, LISTING)


def checked_sources(features: FeatureSet, model: WanConfig) -> list[tuple[DataSource, Recipe]]:
    """The stores that a set names, with their recipes, before any listing is read.

    Raises:
        ConfigError: what `mm.config.data.data_sources` raises.
        DataError: DATA-010 for a folder that is no store, DATA-014 when its recipe is not what the set says,
            or when two stores were made with different encoders, DATA-046 when a store is of another task than the
            model.
    """
    expected = expected_in_training(features)
    found: list[tuple[DataSource, Recipe]] = []
    for source in _sources(features):
        recipe = load_recipe(source.folder)
        if recipe.task != model.task.name:
            message = f"The features in {source.folder} are of the task {recipe.task}, the model is {model.task.name}."
            raise DataError("DATA-046", message, OTHER_TASK)
        remedy = "Correct preprocess_parameters or tokenizer_config, or extract the features again with these values."
        check_recipe(source.folder, recipe, expected, remedy)
        first = found[0][1] if found else recipe
        encoders = {name: getattr(first, name) for name in ENCODER_FIELDS}
        check_recipe(source.folder, recipe, encoders, "Extract all data sets with the same weights as the first.")
        found.append((source, recipe))
    return found
