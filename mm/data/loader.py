"""Micro-batches of features for one replica, resuming anywhere."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config.bad_samples import FAIL, OnBadSample
from mm.config.model import WanConfig
from mm.config.run.data import ConditionDropout, MinBucket, Mixture
from mm.data.balance import sequence_cost
from mm.data.dataset import FeatureDataset, read_empty_prompt, read_sample
from mm.data.open_store import SampleTensors
from mm.data.packing import PackSampler
from mm.data.place import ClipPlace, Place
from mm.data.plan import PlannedSample, SamplingPlan
from mm.data.planning import sampling_plan
from mm.data.replacing import Replaced, check_replaced, may_be_replaced
from mm.data.sampler import BatchPlan, DealtStep, MicroBatchSampler
from mm.data.store.blobs import Blob
from mm.data.workers import Outcome, Parcel, as_error, as_facts, bytes_to_share, read_in_order
from mm.drops import DropRates, Kept, draw_kept
from mm.errors import DataError
from mm.rng import training_noise

if TYPE_CHECKING:  # libraries that decode, which few trainings need
    from mm.data.clips import Clip

logger = logging.getLogger(__name__)

ONE_SOURCE = Mixture()
NOTHING_DROPPED = ConditionDropout()


class _Notes(TypedDict, total=False):
    """Entries that only some micro-batches have.

    Attributes:
        replaced: where samples were, the ids of those that were to be in the micro-batch.
        noise: [b, 16, F, H, W] fp32, `mm.rng.training_noise` of each sample.
        index: of samples that were read, where they are in the data set.
        without_caption: of samples that were read, whether each has the empty caption in place of its own.
        place: of samples that were dealt, of each its number in the step, from 0, and the samples of the step.
    """

    replaced: list[str]
    noise: Tensor
    index: list[int]
    without_caption: list[bool]
    place: list[tuple[int, int]]


class FeatureBatch(_Notes):
    """One micro-batch; noise where it was asked for.

    Attributes:
        latents: [b, 16, F, H, W]. text: [b, text_len, D], zeros after each caption's end.
        sample: ids of the samples. draw: the epoch of each; with the id it keys the sample's random numbers.
        features: what the model's task declares, by name, each [b, *shape].
    """

    latents: Tensor
    text: Tensor
    sample: list[str]
    draw: list[int]
    features: dict[str, Tensor]


def feature_batches(
    dataset: FeatureDataset,
    plan: BatchPlan,
    *,
    text_len: int,
    seed: int,
    consumed_samples: int = 0,
    caption_dropout: float = 0.0,
    condition_dropout: ConditionDropout = NOTHING_DROPPED,
    shuffle: bool = True,
    mixture: Mixture = ONE_SOURCE,
    min_bucket: MinBucket = "error",
    num_steps: int | None = None,
    num_workers: int = 0,
    read_timeout: float = 600.0,
    pin_memory: bool = False,
    on_bad_sample: OnBadSample = FAIL,
    with_noise: bool = False,
    dealt: deque[DealtStep] | None = None,
) -> Generator[FeatureBatch]:
    """This replica's micro-batches without end; with packs its samples one by one (`mm.data.steps` packs them).

    Args:
        dataset: the features.
        plan: sizes of batches and this replica's place.
        text_len: tokens that every prompt is padded to.
        seed: decides order and caption dropout.
        consumed_samples: samples that all replicas together trained on before.
        caption_dropout: probability of the empty caption, drawn for each (sample, epoch).
        condition_dropout: likewise of zeros for what the task has beside it.
        shuffle: a new order each epoch, else the listings' order.
        mixture: how the stores are mixed. min_bucket: what becomes of shapes with few samples.
        num_steps: steps that will be asked for, those taken before included; None for no end.
        num_workers: reading processes; 0 reads in this one, where nothing can end a read that hangs.
        read_timeout: seconds to read one micro-batch.
        pin_memory: put batches into page-locked memory.
        on_bad_sample: whether samples with damaged files are replaced; see `mm.data.replacing`.
        with_noise: draw the noise of each sample beside reading it, ahead of the step that needs it.
        dealt: gets each step before its first micro-batch comes.

    Raises:
        DataError: at once what `sampling_plan` raises, and what `FeatureDataset.empty_prompt` raises if captions are to
            be dropped; while iterating, what reading a sample
            raises, DATA-070 and DATA-071 for a reader that hangs or dies twice, DATA-074 when more samples of an epoch
            are replaced than allowed in this replica alone.
    """
    order = sampling_plan(dataset, plan, mixture, seed, shuffle=shuffle, min_bucket=min_bucket, num_steps=num_steps)
    empty = None
    if caption_dropout > 0:
        dataset.empty_prompt()  # a damaged one is told now, and not when a caption happens to be dropped
        empty = dataset.empty_prompt_file()
    rates = DropRates(text=caption_dropout, **condition_dropout.model_dump())
    draws = _Draws(dataset, order, seed, rates, on_bad_sample)
    sampler = dealt_groups(dataset, order, plan, consumed_samples, dealt)
    work = _ReadBatch(dataset.model, text_len, empty, seed if with_noise else None)
    outcomes = read_in_order(
        work,
        ([draws.draw(sample) for sample in group] for group in sampler),
        num_workers=num_workers,
        time_limit=read_timeout,
        buffer_bytes=_most_bytes(dataset, max(mixture.sizes(plan.micro_batch_size)), text_len, with_noise=with_noise),
        again=draws.without_bad_sample,
    )
    return _batches(outcomes, work, draws, pin_memory)


@dataclass(frozen=True, slots=True)
class _Draw:
    """A sample as planned: its id, where it is, what it is shown without, what it stands in for."""

    name: str
    sample: PlannedSample
    place: Place
    kept: Kept
    instead_of: Replaced | None = None
    first_index: int = -1  # of the sample that it stands in for


class _Draws:
    """Decides what is read: a function of the seed, the plan and which files are damaged."""

    def __init__(
        self, dataset: FeatureDataset, plan: SamplingPlan, seed: int, rates: DropRates, policy: OnBadSample
    ) -> None:
        self._dataset = dataset
        self._plan = plan
        self._seed = seed
        self._rates = rates
        self._policy = policy
        self._replaced_in_epoch: Counter[int] = Counter()

    def draw(self, sample: PlannedSample, instead_of: Replaced | None = None, first_index: int = -1) -> _Draw:
        name = self._dataset.name(sample.index)
        kept = draw_kept(self._rates, self._seed, name, sample.draw)
        return _Draw(name, sample, self._dataset.place(sample.index), kept, instead_of, first_index)

    def without_bad_sample(self, batch: list[_Draw], outcome: Outcome) -> list[_Draw] | None:
        """The micro-batch with another place of a sample that cannot be read, where it can be made; else with the next
        sample of the epoch in place of a damaged one, where the policy allows that.
        """
        bad = _bad_sample(outcome)
        if bad is None or not may_be_replaced(bad[1]):
            return None
        number, error = bad
        old = batch[number]
        place = self._dataset.place_again(old.sample.index, old.place)
        if place is not None:
            logger.warning("%s is made again: %s", old.name, error.problems[0])
            return [*batch[:number], replace(old, place=place), *batch[number + 1 :]]
        if not self._policy.skips:
            return None
        first = old.sample.index if old.instead_of is None else old.first_index
        sample = replace(self._plan.next_in_epoch(old.sample), place=old.sample.place)
        if sample.index == first:  # once around: no sample is whole
            return None
        new = self.draw(sample, old.instead_of or Replaced(old.name, error.problems[0]), first)
        return [*batch[:number], new, *batch[number + 1 :]]

    def complete(self, batch: list[_Draw], parcel: Parcel) -> list[SampleTensors]:
        """The samples of a micro-batch of which some came as clips: their features are made here, one by one."""
        names = ["latents", "prompt", *self.features]
        samples: list[SampleTensors] = []
        for number, draw in enumerate(batch):
            if isinstance(draw.place, ClipPlace):
                samples.append(self._dataset.make(draw.place, _clip_in(parcel, number)))
            else:
                tensors = {name: parcel.tensors[f"{number} {name}"] for name in names}
                features = {name: tensors[name] for name in names[2:]}
                samples.append({"latents": tensors["latents"], "prompt": tensors["prompt"], "features": features})
        return samples

    @property
    def features(self) -> list[str]:
        """Names of the features that the model's task declares."""
        return [feature.name for feature in self._dataset.model.task.stored]

    def note_replaced(self, batch: list[_Draw]) -> list[str]:
        """Count and log what was replaced in a micro-batch that is handed out now; returns the ids."""
        for draw in batch:
            if draw.instead_of is not None:
                epoch = draw.sample.draw
                self._replaced_in_epoch[epoch] += 1
                bad = draw.instead_of
                message = "%s is replaced by %s in epoch %d: %s"
                logger.warning(message, bad.sample, draw.name, epoch, bad.problem)
                check_replaced(self._replaced_in_epoch[epoch], len(self._dataset), len(self._dataset), self._policy)
        return [draw.instead_of.sample for draw in batch if draw.instead_of is not None]


@dataclass(frozen=True)
class _ReadBatch:
    """Reads, pads and stacks one micro-batch.

    Attributes:
        empty: the empty prompt's file and recipe, if captions are dropped. noise_seed: of the noise, if it is drawn.
    """

    model: WanConfig
    text_len: int
    empty: tuple[Path | Blob, str] | None
    noise_seed: int | None

    def __call__(self, batch: list[_Draw], /) -> Parcel:
        samples: dict[int, SampleTensors] = {}
        clips: dict[int, Clip] = {}
        for number, draw in enumerate(batch):
            try:
                if isinstance(draw.place, ClipPlace):
                    clips[number] = _load_clip(draw.place)
                else:
                    samples[number] = read_sample(draw.place, self.model)
            except DataError as error:
                return Parcel({}, {"bad": number, "problems": as_facts(error.problems)})
        if clips:  # the features of some are made by the process that has the encoders, which then stacks
            return _apart(samples, clips)
        return Parcel(self.stacked(batch, list(samples.values())), {})

    def stacked(self, batch: list[_Draw], samples: list[SampleTensors]) -> dict[str, Tensor]:
        """Tensors of a micro-batch, without the captions and conditions that are dropped, padded, and with noise."""
        for draw, sample in zip(batch, samples, strict=True):
            if not draw.kept.text and self.empty is not None:
                self._drop_caption(sample, self.empty)
            drop_conditions(sample["features"], self.model, draw.kept)
        stacked = {
            "latents": _stacked([sample["latents"] for sample in samples]),
            "text": _stacked([F.pad(s["prompt"], (0, 0, 0, self.text_len - len(s["prompt"]))) for s in samples]),
        }
        for name in samples[0]["features"]:
            stacked[name] = _stacked([sample["features"][name] for sample in samples])
        if self.noise_seed is not None:
            shape = stacked["latents"].shape[1:]
            stacked["noise"] = _stacked(
                [training_noise(self.noise_seed, draw.name, draw.sample.draw, shape) for draw in batch]
            )
        return stacked

    def _drop_caption(self, sample: SampleTensors, empty: tuple[Path | Blob, str]) -> None:
        sample["prompt"] = read_empty_prompt(*empty, self.model)
        for feature in self.model.task.features:
            if feature.dropped_with_caption:
                sample["features"][feature.name].zero_()

    def describe(self, batch: list[_Draw], /) -> str:
        return ", ".join(f"{draw.place} ({draw.name})" for draw in batch)


def _load_clip(place: ClipPlace) -> Clip:
    from mm.data.clips import load_clip

    return load_clip(place.sample, place.clip, place.seed, place.draw, place.media)


def _apart(samples: Mapping[int, SampleTensors], clips: Mapping[int, Clip]) -> Parcel:
    """Samples and clips of a micro-batch, not stacked: tensors by number and name."""
    from mm.data.clips import in_parts

    tensors, facts = dict[str, Tensor](), dict[str, Any]()
    for number, clip in clips.items():
        parts, facts[str(number)] = in_parts(clip)
        tensors |= {f"{number} {name}": value for name, value in parts.items()}
    for number, sample in samples.items():
        for name, value in {"latents": sample["latents"], "prompt": sample["prompt"], **sample["features"]}.items():
            tensors[f"{number} {name}"] = value
    return Parcel(tensors, {"clips": facts})


def _clip_in(parcel: Parcel, number: int) -> Clip:
    from mm.data.clips import of_parts

    begin = f"{number} "
    tensors = {name.removeprefix(begin): value for name, value in parcel.tensors.items() if name.startswith(begin)}
    return of_parts(tensors, parcel.facts["clips"][str(number)])


def drop_conditions(features: Mapping[str, Tensor], model: WanConfig, kept: Kept) -> None:
    """Put zeros in the place of the conditions of a sample that are dropped; `features` are changed."""
    for feature in model.task.stored:
        value = features[feature.name]
        parts = {} if feature.parts is None else feature.parts(model.feature_sizes())
        begins = dict(zip(parts, accumulate(parts.values(), initial=0), strict=False))
        for word in feature.dropped_as:
            if not getattr(kept, word):
                begin, length = begins.get(word, 0), parts.get(word, len(value))
                value[begin : begin + length].zero_()


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one; of a single one, which is this process's own, no copy is made."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def _batches(
    outcomes: Generator[tuple[list[_Draw], Outcome]], work: _ReadBatch, draws: _Draws, pin_memory: bool
) -> Generator[FeatureBatch]:
    try:
        for drawn, outcome in outcomes:
            bad = _bad_sample(outcome)
            if bad is not None:
                raise bad[1]
            if isinstance(outcome, DataError):
                raise outcome
            found = outcome.tensors
            if "clips" in outcome.facts:
                found = work.stacked(drawn, draws.complete(drawn, outcome))
            tensors = {name: tensor.pin_memory() if pin_memory else tensor for name, tensor in found.items()}
            batch: FeatureBatch = {
                "latents": tensors["latents"],
                "text": tensors["text"],
                "sample": [draw.name for draw in drawn],
                "draw": [draw.sample.draw for draw in drawn],
                "features": {name: tensors[name] for name in draws.features},
                "index": [draw.sample.index for draw in drawn],
                "without_caption": [not draw.kept.text for draw in drawn],
                "place": [draw.sample.place for draw in drawn],
            }
            if "noise" in tensors:
                batch["noise"] = tensors["noise"]
            if replaced := draws.note_replaced(drawn):
                batch["replaced"] = replaced
            yield batch
    finally:
        outcomes.close()  # ends the reading processes now, not when an error's traceback is dropped


def _bad_sample(outcome: Outcome) -> tuple[int, DataError] | None:
    """Index of the sample of a micro-batch that could not be read, and its error."""
    if isinstance(outcome, Parcel) and "bad" in outcome.facts:
        return outcome.facts["bad"], as_error(outcome.facts["problems"])
    return None


def _most_bytes(dataset: FeatureDataset, micro_batch_size: int, text_len: int, *, with_noise: bool) -> int:
    """Size in bytes of the tensors of a micro-batch of the largest samples."""
    model = dataset.model
    largest = max(dataset.shapes(), key=lambda shape: torch.Size(shape).numel())
    shapes: Sequence[tuple[int, ...]] = [largest, (text_len, model.text_dim)]
    if with_noise:
        shapes = [*shapes, largest]
    stored = model.stored_shapes(largest[1:])
    shapes = [*shapes, *stored.values(), *(stored[one.name] for one in model.task.stored if one.stored)]  # of 64 bits
    clips = micro_batch_size * dataset.clip_bytes  # in place of some samples
    return clips + bytes_to_share(*((micro_batch_size, *shape) for shape in shapes))


def dealt_groups(
    dataset: FeatureDataset,
    order: SamplingPlan,
    plan: BatchPlan,
    consumed_samples: int,
    dealt: deque[DealtStep] | None = None,
) -> Iterable[list[PlannedSample]]:
    """This replica's micro-batches as they are planned, or of packs the samples one by one, without end where the plan
    has none; arguments are those of `MicroBatchSampler`.
    """
    cost = sequence_cost(dataset.model, plan.pair_cost)
    if plan.pack_tokens is not None:
        return PackSampler(order, plan, consumed_samples, plan.pack_tokens, cost, dealt)
    all_cost_the_same = order.is_even and len(dataset.token_counts()) == 1
    return MicroBatchSampler(order, plan, consumed_samples, None if all_cost_the_same else cost, dealt)
