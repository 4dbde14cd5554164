"""The first micro-batches of a training, read as the training reads them, with what each sample is."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, pairwise

from torch import Tensor

from mm.config.bad_samples import FAIL, OnBadSample, parse_on_bad_sample
from mm.config.data import TEMPORAL_STRIDE
from mm.config.layout import layout_of
from mm.config.run.data import ConditionDropout, MinBucket, Mixture
from mm.config.run.training import TrainingRun
from mm.config.tasks.task import Task
from mm.data.balance import cost_of_model
from mm.data.dataset import FeatureDataset
from mm.data.listing import LatentShape, ListedSample
from mm.data.loader import NOTHING_DROPPED, ONE_SOURCE, FeatureBatch, dealt_groups, feature_batches
from mm.data.plan import PlannedSample, SamplingPlan
from mm.data.planning import SourceOfData, sources_of
from mm.data.recipe import Recipe
from mm.data.sampler import BatchPlan, DealtStep
from mm.look.facts import LookedBatch, LookedSample
from mm.look.pictures import Eye, clip_strip, feature_strips, numbers_of, strips_in_front
from mm.wan.encoders import clean_text


@dataclass(frozen=True)
class Drawing:
    """All that decides what a training draws.

    Attributes:
        batches: sizes of the global batch and of micro-batches, and the replicas and stages of the layout.
        seed, caption_dropout, condition_dropout, shuffle, mixture, min_bucket, on_bad_sample: of the run.
        first_step: to show, counted from 1. steps: of the whole training; None where no run says it.
    """

    batches: BatchPlan
    seed: int
    caption_dropout: float = 0.0
    condition_dropout: ConditionDropout = NOTHING_DROPPED
    shuffle: bool = True
    mixture: Mixture = ONE_SOURCE
    min_bucket: MinBucket = "error"
    on_bad_sample: OnBadSample = FAIL
    first_step: int = 1
    steps: int | None = None

    def sources_of(self, dataset: FeatureDataset) -> Iterator[SourceOfData]:
        """The sources of a data set; raises CFG-203 as `mm.data.planning.sampling_plan`."""
        size = self.batches.micro_batch_size
        return sources_of(dataset, self.mixture, size, shuffle=self.shuffle, min_bucket=self.min_bucket)

    @property
    def consumed_samples(self) -> int:
        """Samples of the steps before the first to show."""
        return (self.first_step - 1) * self.batches.global_batch_size


def drawing_of(run: TrainingRun, first_step: int) -> Drawing:
    """All that decides what a run draws, of replica 0, from a step on."""
    data, layout = run.data, layout_of(run)
    return Drawing(
        batches=BatchPlan(
            run.samples_of_step(layout.dp_size),
            data.micro_batch_size,
            dp_size=layout.dp_size,
            num_stages=layout.pp_size,
            pack_tokens=data.pack_tokens,
            pair_cost=data.pair_cost,
            multiple=layout.micro_batches_come_in,
        ),
        seed=run.training.seed,
        caption_dropout=data.caption_dropout,
        condition_dropout=data.condition_dropout,
        shuffle=data.shuffle,
        mixture=data.mixture,
        min_bucket=data.min_bucket,
        on_bad_sample=parse_on_bad_sample(data.on_bad_sample),
        first_step=first_step,
        steps=run.training.steps,
    )


def looked_batches(
    dataset: FeatureDataset, drawing: Drawing, plan: SamplingPlan, viewer: Viewer, count: int
) -> Iterator[LookedBatch]:
    """The first micro-batches of all replicas in the order of the plan.

    Args:
        dataset: the features. drawing: what is drawn of them. plan: their sampling plan by it.
        viewer: makes what is shown of a sample. count: micro-batches.

    Raises:
        ConfigError, DataError: what `mm.data.loader.feature_batches` raises, and of shards `ShardStore.listed`.
    """
    alone = replace(drawing.batches, dp_rank=0, dp_size=1, num_stages=1)
    if drawing.steps is not None:
        count = min(count, (drawing.steps - drawing.first_step + 1) * alone.groups_of_step)
    planned = islice(_dealt(dataset, drawing, plan, alone), count)
    read = read_batches(dataset, drawing, alone)
    sources = [source.where for source in drawing.sources_of(dataset) if source.buckets]
    replicas = _replicas(dataset, drawing, plan, count)
    with closing(read):
        for place, (group, batch) in enumerate(zip(planned, read, strict=False)):
            step, number = divmod(place, alone.groups_of_step)
            yield LookedBatch(
                step=drawing.first_step + step,
                number=number + 1,
                count=alone.groups_of_step,
                replica=replicas.get(_key(group)),
                source=sources[group[0].walk[0]],
                samples=[viewer.sample(batch, row) for row in range(len(batch["sample"]))],
                replaced=batch.get("replaced", []),
            )


def read_batches(
    dataset: FeatureDataset, drawing: Drawing, batches: BatchPlan, dealt: deque[DealtStep] | None = None
) -> Generator[FeatureBatch]:
    """Micro-batches of one replica as the training reads them, of packs its samples one by one.

    Args:
        dataset: the features. drawing: what is drawn of them. batches: the replica. dealt: as for `feature_batches`.

    Raises:
        ConfigError, DataError: what `mm.data.loader.feature_batches` raises.
    """
    return feature_batches(
        dataset,
        batches,
        text_len=dataset.model.text_len,
        seed=drawing.seed,
        consumed_samples=drawing.consumed_samples,
        caption_dropout=drawing.caption_dropout,
        condition_dropout=drawing.condition_dropout,
        shuffle=drawing.shuffle,
        mixture=drawing.mixture,
        min_bucket=drawing.min_bucket,
        num_steps=drawing.steps,
        on_bad_sample=drawing.on_bad_sample,
        dealt=dealt,
    )


def _dealt(
    dataset: FeatureDataset, drawing: Drawing, plan: SamplingPlan, batches: BatchPlan
) -> Iterator[list[PlannedSample]]:
    """Micro-batches of one replica as they are planned."""
    return iter(dealt_groups(dataset, plan, batches, drawing.consumed_samples))


def _replicas(
    dataset: FeatureDataset, drawing: Drawing, plan: SamplingPlan, count: int
) -> dict[tuple[tuple[int, int], int], int]:
    """The replica of each of the first micro-batches, by its first sample's place in the plan; none for one replica."""
    batches = drawing.batches
    if batches.dp_size == 1:
        return {}
    own = -(-count // batches.groups_of_step) * batches.num_micro_batches
    return {
        _key(group): rank
        for rank in range(batches.dp_size)
        for group in islice(_dealt(dataset, drawing, plan, replace(batches, dp_rank=rank)), own)
    }


def _key(group: Sequence[PlannedSample]) -> tuple[tuple[int, int], int]:
    return group[0].walk, group[0].position


@dataclass(frozen=True)
class Viewer:
    """Makes what is shown of a sample.

    Attributes:
        dataset: the features. recipes: by the stores' folders. eye: what latents are looked at with.
        most_frames: to show of a clip.
    """

    dataset: FeatureDataset
    recipes: Mapping[str, Recipe]
    eye: Eye
    most_frames: int

    def sample(self, batch: FeatureBatch, row: int) -> LookedSample:
        """One sample of a micro-batch; of shards raises what `ShardStore.listed` does."""
        index, latents = batch["index"][row], batch["latents"][row]
        place, listed = self.dataset.place(index), self.dataset.listed(index)
        recipe = self.recipes[str(place.folder)]
        channels, frames, height, width = place.latent_shape
        in_front = listed.frames_in_front(frames) if self.dataset.model.task.most_in_front else 0
        size = pixel_size((channels, frames - in_front, height, width), self.dataset.model.task)
        sources = source_frames(listed, recipe, size[0])
        task = self.dataset.model.task
        features: dict[str, Tensor] = {name: value[row] for name, value in batch["features"].items()}
        tokens = self.dataset.num_tokens(index)
        return LookedSample(
            id=batch["sample"][row],
            store=str(place.folder),
            video=listed.path,
            caption=clean_text(listed.cap),
            without_caption=batch["without_caption"][row],
            text_tokens=self.dataset.text_tokens(index),
            cut_at=recipe.max_text_tokens,
            size=size,
            latent_shape=place.latent_shape,
            tokens=tokens,
            cost=cost_of_model(self.dataset.model)(tokens),
            draw=batch["draw"][row],
            window=window(listed, sources),
            strips=[
                clip_strip(self.eye, latents[:, in_front:], sources, self.most_frames),
                *strips_in_front(self.eye, task, latents[:, :in_front]),
                *feature_strips(self.eye, task, features, self.most_frames, in_front),
            ],
            numbers=numbers_of(task, features),
        )


def pixel_size(shape: LatentShape, task: Task) -> tuple[int, int, int]:
    """Frames, height and width of a clip by the shape of its latents."""
    _, frames, height, width = shape
    return (frames - 1) * TEMPORAL_STRIDE + 1, height * task.latent_pixels, width * task.latent_pixels


def source_frames(listed: ListedSample, recipe: Recipe, count: int) -> Sequence[int]:
    """Numbers in the source of the clip's frames: those that were recorded, else every so-manieth from its start."""
    if listed.taken is not None and "frames" in listed.taken:
        return [int(number) for number in listed.taken["frames"]]
    return range(listed.start_frame_idx, listed.start_frame_idx + count * recipe.frame_interval, recipe.frame_interval)


def window(listed: ListedSample, sources: Sequence[int]) -> str:
    """The part of the source that a clip is, in words."""
    if len(sources) == 1:
        words = f"frame {sources[0]}"
    else:
        steps = {later - earlier for earlier, later in pairwise(sources)}
        every = f", every {_ordinal(*steps)}" if len(steps) == 1 and steps != {1} else ""
        uneven = ", unevenly spaced" if len(steps) > 1 else ""
        words = f"frames {sources[0]} to {sources[-1]}{every}{uneven}"
    if listed.taken is None:
        return words
    resized, corner = listed.taken.get("resized"), listed.taken.get("corner")
    if resized:
        words += f"; resized to {resized[0]}x{resized[1]}"
    return words + (f", cropped at row {corner[0]}, column {corner[1]}" if corner else "")


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
