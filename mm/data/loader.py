"""Micro-batches of features for one replica, resuming anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mm.data.dataset import FeatureDataset, ImageFeatures
from mm.data.sampler import BatchPlan, MicroBatchSampler
from mm.errors import DataError, MMError
from mm.rng import generator


class FeatureBatch(ImageFeatures):
    """One micro-batch; tensors of images where the features have them.

    Attributes:
        latents: [b, 16, F, H, W]. text: [b, text_len, D], zeros after each caption's end.
        sample: ids of the samples. draw: the epoch of each; with the id it keys the sample's random numbers.
    """

    latents: Tensor
    text: Tensor
    sample: list[str]
    draw: list[int]


def feature_batches(
    dataset: FeatureDataset,
    plan: BatchPlan,
    *,
    text_len: int,
    seed: int,
    consumed_samples: int = 0,
    caption_dropout: float = 0.0,
    shuffle: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[FeatureBatch]:
    """This replica's micro-batches without end.

    Args:
        dataset: the features.
        plan: sizes of batches and this replica's place.
        text_len: tokens that every prompt is padded to.
        seed: decides order and caption dropout.
        consumed_samples: samples that all replicas together trained on before.
        caption_dropout: probability of the empty caption, drawn for each (sample, epoch).
        shuffle: a new order each epoch, else the listings' order.
        num_workers: reading processes; 0 reads in this one. pin_memory: see torch's DataLoader.

    Raises:
        DataError: DATA-015 at once when samples of different shapes would have to share a micro-batch; while
            iterating, what reading a sample raises. Reading stops there: no sample is replaced.
    """
    _require_one_shape(dataset, plan.micro_batch_size)
    draws = _Draws(dataset, text_len, seed, caption_dropout)
    sampler = MicroBatchSampler(plan, len(dataset), seed, consumed_samples, shuffle)
    loader = DataLoader(
        draws,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # the loader's own seed decides nothing here; without a generator it would draw from the global one
        generator=torch.Generator(),
    )
    return _raise_errors(iter(loader))


class _Draws(Dataset["FeatureBatch | MMError"]):
    """Samples indexed by (index, epoch), ready to stack.

    An error is returned, not raised: torch's workers cannot pass on an exception with three arguments.
    """

    def __init__(self, dataset: FeatureDataset, text_len: int, seed: int, caption_dropout: float) -> None:
        self._dataset = dataset
        self._text_len = text_len
        self._seed = seed
        self._caption_dropout = caption_dropout
        self._empty_prompt = dataset.empty_prompt() if caption_dropout > 0 else None

    def __getitem__(self, place: tuple[int, int]) -> FeatureBatch | MMError:
        index, epoch = place
        try:
            item = self._dataset[index]
        except MMError as error:
            return error
        name = self._dataset.samples[index].id
        prompt = item["prompt"]
        if self._empty_prompt is not None:
            chance = torch.rand((), generator=generator(self._seed, "caption_dropout", name, epoch))
            if float(chance) < self._caption_dropout:
                prompt = self._empty_prompt
        text = F.pad(prompt, (0, 0, 0, self._text_len - len(prompt)))
        drawn: FeatureBatch = {"latents": item["latents"], "text": text, "sample": [name], "draw": [epoch]}
        if "condition" in item:  # the images stay where the caption is dropped: guidance is about the caption alone
            drawn["image_features"], drawn["condition"] = item["image_features"], item["condition"]
        return drawn


def _collate(items: list[FeatureBatch | MMError]) -> FeatureBatch | MMError:
    batch: list[FeatureBatch] = []
    for item in items:
        if isinstance(item, MMError):
            return item
        batch.append(item)
    stacked: FeatureBatch = {
        "latents": torch.stack([item["latents"] for item in batch]),
        "text": torch.stack([item["text"] for item in batch]),
        "sample": [name for item in batch for name in item["sample"]],
        "draw": [epoch for item in batch for epoch in item["draw"]],
    }
    if "condition" in batch[0]:
        stacked["image_features"] = torch.stack([item["image_features"] for item in batch])
        stacked["condition"] = torch.stack([item["condition"] for item in batch])
    return stacked


def _raise_errors(batches: Iterator[FeatureBatch | MMError]) -> Iterator[FeatureBatch]:
    error: MMError | None = None
    for batch in batches:
        if isinstance(batch, MMError):
            error = batch
            break
        yield batch
    del batches  # ends the reading processes now, not when the error's traceback is dropped
    if error is not None:
        raise error


def _require_one_shape(dataset: FeatureDataset, micro_batch_size: int) -> None:
    shapes = dataset.shapes()
    if len(shapes) > 1 and micro_batch_size > 1:
        counts = ", ".join(f"{count} of {list(shape)}" for shape, count in shapes.most_common(8))
        more = f" and {len(shapes) - 8} more shapes" if len(shapes) > 8 else ""
        raise DataError(
            "DATA-015",
            f"Micro-batches of {micro_batch_size} samples need one latent shape; there are {counts}{more}.",
            "Set --micro-batch-size 1 (and raise --global-batch-size), or extract with one size and length.",
        )
