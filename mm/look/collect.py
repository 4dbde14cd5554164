"""All that a page about training data shows, collected: a few samples are read, all others are only counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mm.config.data import StoreSource
from mm.config.run.encoders import Tiles
from mm.config.tasks.registry import FEATURE_TASKS
from mm.data.dataset import FeatureDataset
from mm.data.planning import sampling_plan
from mm.data.recipe import UNKNOWN, Recipe, folder_fingerprint
from mm.errors import DataError
from mm.look.facts import Looked, LookedBatch
from mm.look.packs import looked_packs
from mm.look.pictures import Eye, open_eye
from mm.look.samples import Drawing, Viewer, looked_batches
from mm.look.tables import (
    COUNTED_IN_SHAPES,
    bucket_rows,
    histograms,
    recipe_rows,
    skipped_of,
    small_in_words,
    source_rows,
)
from mm.wan.encoders import DTYPES


@dataclass(frozen=True)
class Question:
    """Question about a data set.

    Attributes:
        title: of the page. dataset: the features. sources: their stores with recipes. drawing: what is drawn of them.
        facts: of the run, (name, value). num_batches: micro-batches to show. num_frames: of a clip.
    """

    title: str
    dataset: FeatureDataset
    sources: list[tuple[StoreSource, Recipe]]
    drawing: Drawing
    facts: list[tuple[str, str]]
    num_batches: int
    num_frames: int


def collect(question: Question, eye: Eye, vae: Path | None, done: Callable[[], None]) -> Looked:
    """Collect what a page shows.

    Args:
        question: what is to be looked at. eye: what latents are looked at with. vae: its folder, if it decodes.
        done: told after each micro-batch.

    Raises:
        ConfigError, DataError: what `mm.data.planning.sampling_plan`, `mm.look.samples.looked_batches` and
            `mm.look.tables.skipped_of` raise.
    """
    dataset, drawing = question.dataset, question.drawing
    recipes = {str(source.folder): recipe for source, recipe in question.sources}
    plan = sampling_plan(
        dataset,
        drawing.batches,
        drawing.mixture,
        drawing.seed,
        shuffle=drawing.shuffle,
        min_bucket=drawing.min_bucket,
        num_steps=drawing.steps,
    )
    stretch, sources = source_rows(dataset, drawing, plan)
    viewer = Viewer(dataset, recipes, eye, question.num_frames)
    batches: list[LookedBatch] = []
    if drawing.batches.pack_tokens is not None:
        found = looked_packs(dataset, drawing, viewer, question.num_batches)
    else:
        found = looked_batches(dataset, drawing, plan, viewer, question.num_batches)
    for batch in found:
        batches.append(batch)
        done()
    skipped = [skipped_of(source.folder) for source, _ in question.sources]
    return Looked(
        title=question.title,
        facts=question.facts,
        decoded_by=None if vae is None else str(vae),
        warnings=list(_warnings(recipes, vae)),
        batches=batches,
        stretch=stretch,
        sources=sources,
        buckets=bucket_rows(dataset, drawing, sources),
        histograms=histograms(dataset),
        skipped=[found for found in skipped if found is not None],
        small=small_in_words(dataset, drawing) + (COUNTED_IN_SHAPES if dataset.model.task.most_in_front else ""),
        recipes=[(store, recipe_rows(recipe)) for store, recipe in recipes.items()],
    )


def matching_eye(vae: Path | None, sources: list[tuple[StoreSource, Recipe]], device: torch.device) -> Eye:
    """The eye for the features of these stores, in the precision and tiles that they were made in.

    Args:
        vae: folder of the VAE; None for false colours. sources: the stores with their recipes.
        device: where it decodes.

    Raises:
        DataError: DATA-220 for a VAE of other weights than the features were made with, DATA-040 to DATA-042 for one
            that cannot be loaded.
    """
    recipe = sources[0][1]  # training refuses stores of several VAEs
    if vae is not None and recipe.vae != UNKNOWN:
        found = folder_fingerprint(vae)
        if found != recipe.vae:
            store = sources[0][0].folder
            message = (
                f"--vae {vae} has the fingerprint {found}, and the features in {store} were made with {recipe.vae}."
            )
            remedy = "Give the VAE that the features were extracted with, or none, to see latents in false colours."
            raise DataError("DATA-220", message, remedy)
    tiles = None
    if recipe.tile_size is not None and recipe.tile_stride is not None:
        tiles = Tiles(size=recipe.tile_size, stride=recipe.tile_stride)
    precisions = {str(name): name for name in DTYPES}
    latent_pixels = FEATURE_TASKS[recipe.task].latent_pixels
    return open_eye(vae, precisions.get(recipe.vae_dtype, "fp32"), tiles, device, latent_pixels)


def _warnings(recipes: Mapping[str, Recipe], vae: Path | None) -> list[str]:
    found = []
    if vae is None:
        found.append("No VAE was given (--vae): pictures are latents in false colours, not what the clips look like.")
    unknown = [store for store, recipe in recipes.items() if recipe.vae == UNKNOWN]
    if vae is not None and unknown:
        found.append(
            f"It is not known which VAE the features in {', '.join(unknown)} were made with: pictures may lie."
        )
    return found
