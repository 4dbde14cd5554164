"""A store looked at without a run: the model is one of a released size that takes its features."""

from __future__ import annotations

from pathlib import Path

from mm.config.model import WAN_14B, WanConfig, of_task
from mm.config.run.data import FeatureSet
from mm.config.storage import Location, Remote
from mm.config.tasks.registry import FEATURE_TASKS, TASKS
from mm.config.tasks.task import Entry, Sizes
from mm.data.dataset import FeatureDataset, open_features
from mm.data.features import LISTING, Header, read_header
from mm.data.files import path_below
from mm.data.place import FeaturePlace
from mm.data.recipe import load_recipe
from mm.data.store.blobs import read_tensors
from mm.errors import DataError

COSTS_OF = "Wan2.1 14B"
"""The model by whose size costs are told where no run says one."""


def features_of_store(store: Location) -> FeatureSet:
    """The features of one store, whatever they were made of."""
    if isinstance(store, Remote):
        return FeatureSet(path=store.url, storage=store.storage)
    return FeatureSet(path=str(store / LISTING), folder=str(store))


def open_alone(store: Location) -> FeatureDataset:
    """Open a store with a model that takes what its first sample has.

    Raises:
        DataError: what `mm.data.dataset.open_features` raises, DATA-010 for a store without samples, and what reading
            the header of its first sample raises.
    """
    recipe = load_recipe(store)
    released = of_task(WAN_14B, TASKS[FEATURE_TASKS[recipe.task].trains])
    dataset = open_features(features_of_store(store), released)
    if not len(dataset):
        raise DataError("DATA-010", f"{store} holds no samples.", "Extract features into it.")
    shapes = {
        name: shape for header in _headers(dataset.stored_place(0)) for name, (_, shape) in header.tensors.items()
    }
    return dataset.with_model(_taking(shapes, released, recipe.max_text_tokens))


def _taking(shapes: dict[str, tuple[int, ...]], released: WanConfig, text_len: int) -> WanConfig:
    """The released model of the task with the widths of these features."""
    changed = {"text_len": text_len}
    if len(shapes.get("prompt", ())) == 2:
        changed["text_dim"] = shapes["prompt"][1]
    task = released.task
    for feature in task.entering(Entry.CONTEXT):
        tokens = shapes.get(feature.name, ())
        if len(tokens) == 2:
            changed |= {
                "clip_token_len": tokens[0] // feature.shape(Sizes(1, (1, 1, 1), 1, 1))[0],
                "img_dim": tokens[1],
            }
    return WanConfig.model_validate(released.model_dump() | changed)


def _headers(place: FeaturePlace) -> list[Header]:
    """Headers of a sample and of its caption's embedding, which in a store of files is one."""
    if place.blobs is None:
        assert isinstance(place.folder, Path)  # noqa: S101  stores of one file a sample are local
        return [read_header(path_below(place.folder, place.file, str(place.folder / LISTING)))]
    return [read_tensors(blob, str(blob))[0] for blob in place.blobs]
