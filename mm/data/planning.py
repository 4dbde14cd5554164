"""The sampling plan of a data set of feature stores."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from mm.config.run.data import MinBucket, Mixture, SourceShare
from mm.config.step import AS_LISTED
from mm.config.storage import Storage, location_of
from mm.data.dataset import DatasetDraw, FeatureDataset
from mm.data.files import raise_limited
from mm.data.listing import LatentShape
from mm.data.plan import Bucket, PlannedSource, SamplingPlan
from mm.data.sampler import BatchPlan
from mm.errors import ConfigError, Problem, raise_all

logger = logging.getLogger(__name__)

_ORDER = "keyed bijections"  # name it anew when the same settings would give another order


def sampling_plan(
    dataset: FeatureDataset,
    batches: BatchPlan,
    mixture: Mixture,
    seed: int,
    *,
    shuffle: bool,
    min_bucket: MinBucket = "error",
    num_steps: int | None = None,
) -> SamplingPlan:
    """The plan of a run.

    Samples of one shape form a bucket of their store. Where micro-batches of one sample are taken as listed, all of a
    store form one, since nothing has to share a shape. Without shares all stores are one source.

    Args:
        dataset: the features. batches: sizes of the global batch and of micro-batches. mixture: shares of the stores.
        seed: of the order. shuffle: a new order each epoch. min_bucket: for shapes with few samples.
        num_steps: steps of the run; None for no end.

    Raises:
        ConfigError: CFG-203 for a share of no store, two of one, or one that is over before it begins; CFG-204 where at
            some step no store is open.
        DataError: DATA-015 for buckets smaller than a micro-batch, or when leaving them out leaves nothing.
    """
    sources: list[PlannedSource] = []
    used: list[SourceOfData] = []
    small: list[Problem] = []
    for source in sources_of(dataset, mixture, batches.micro_batch_size, shuffle=shuffle, min_bucket=min_bucket):
        small += [_too_small(source, shape, bucket, min_bucket) for (_, shape), bucket in sorted(source.small.items())]
        if source.buckets:
            sources.append(_planned(source, batches))
            used.append(source)
    if min_bucket == "error" or not sources:
        raise_limited(small)
    for problem in small:
        logger.warning("left out: %s", problem.message)
    plan = SamplingPlan(sources, seed, shuffle=shuffle, slots_of_step=batches.groups_of_step)
    _tell_of_timed_shares([source.share for source in used], plan, batches.groups_of_step, num_steps)
    if plan.end is not None and (num_steps is None or plan.end < num_steps * batches.groups_of_step):
        message = f"In data.mixture.shares no store is open at step {plan.end // batches.groups_of_step}."
        raise ConfigError("CFG-204", message, "Let the steps and epochs at which shares begin and end leave no gap.")
    return plan


def _tell_of_timed_shares(
    shares: Sequence[SourceShare | None], plan: SamplingPlan, groups_of_step: int, num_steps: int | None
) -> None:
    """Tell the steps of shares that begin or end. Raises CFG-203 for one that never is open."""
    for number, share in enumerate(shares):
        if share is None or not share.is_timed:
            continue
        slots = plan.open_slots(number)
        if slots is None and plan.end is None:
            found = f"data.mixture.shares has {share.folder} end before it begins: a step and an epoch contradict."
            raise ConfigError("CFG-203", found, "Correct them, or remove the share.")
        begin = (plan.end if slots is None else slots[0]) or 0
        if num_steps is not None and begin >= num_steps * groups_of_step:
            message = "%s comes after step %d, and the run ends with step %d: none of its samples are trained on"
            logger.warning(message, share.folder, begin // groups_of_step, num_steps)
        elif slots is not None and (share.begin_epoch or share.end_epoch is not None):
            last = "the end" if slots[1] is None else f"step {slots[1] // groups_of_step:,}"
            logger.info("%s is trained on from step %d to %s", share.folder, begin // groups_of_step + 1, last)


@dataclass(frozen=True)
class SourceOfData:
    """Samples that are drawn from together: those of one store, or of all where the mixture has no shares.

    Attributes:
        where: name in messages. part: the samples. share: what the mixture says of them.
        micro_batch_size: samples in a micro-batch of them.
        buckets: by draw and shape; of each draw one of all samples, under any of their shapes, where they need not be
            told apart.
        small: buckets with fewer samples than a micro-batch takes, which are not in the plan.
    """

    where: str
    part: FeatureDataset
    share: SourceShare | None
    micro_batch_size: int
    buckets: dict[tuple[int, LatentShape], Bucket]
    small: dict[tuple[int, LatentShape], Bucket]


def sources_of(
    dataset: FeatureDataset,
    mixture: Mixture,
    micro_batch_size: int,
    *,
    shuffle: bool,
    min_bucket: MinBucket = "error",
) -> Iterator[SourceOfData]:
    """The sources of a data set; arguments are those of `sampling_plan`. Raises CFG-203 as it does."""
    for where, first, part, share in _parts(dataset, mixture):
        size = micro_batch_size if share is None else share.micro_batch_size or micro_batch_size
        buckets = _buckets(first, part, by_shape=shuffle or size > 1)
        few = set[tuple[int, LatentShape]]()
        if min_bucket != "repeat" and len(buckets) > part.draws:
            few = {place for place, bucket in buckets.items() if bucket.size < size}
        small = {place: buckets.pop(place) for place in few}
        yield SourceOfData(where, part, share, size, buckets, small)


def describe_plan(
    dataset: FeatureDataset,
    mixture: Mixture,
    batches: BatchPlan,
    *,
    shuffle: bool,
    min_bucket: MinBucket = "error",
) -> str:
    """Words for what decides the order beside the data set and the seed, which are compared on resume.

    Stores are told by their place in the list, since where they lie does not matter. Raises CFG-203 as `sampling_plan`.
    """
    words = [_ORDER if shuffle else AS_LISTED]
    several = max(mixture.sizes(batches.micro_batch_size)) > 1
    if len(dataset.shapes()) > 1 and (shuffle or several):
        small = f", small ones: {min_bucket}" if several else ""
        words.append(f"groups of {batches.micro_batch_size} samples of a shape{small}")
    elif mixture.shares:
        words.append(f"groups of {batches.micro_batch_size}")
    if mixture.shares:
        words.append("stores mixed, each in its own order")
    if any(share.is_timed for share in mixture.shares):
        words.append(f"steps of {batches.groups_of_step}")  # which say at which group a share begins
    shares = [share for *_, share in _parts(dataset, mixture)]
    for number, share in enumerate(shares, start=1):
        if share is not None:
            values = share.model_dump(exclude={"folder"}, exclude_defaults=True)
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            words.append(f"store {number}: {said or 'as large as it is'}")
    return "; ".join(words)


def _parts(dataset: FeatureDataset, mixture: Mixture) -> Iterator[tuple[str, int, FeatureDataset, SourceShare | None]]:
    """Name of each source for messages, the index of its first sample, its samples, and its share."""
    if not mixture.shares:
        yield "the features", 0, dataset, None
        return
    shares = {_store_name(share.folder): share for share in mixture.shares}
    listed = [(_store_name(str(folder)), first, part) for folder, first, part in dataset.parts()]
    parts = {folder: (first, part) for folder, first, part in listed}
    problems = [
        Problem(
            "CFG-203",
            f"data.mixture.shares names {share.folder}, and the features are {', '.join(parts)}.",
            "Correct it.",
        )
        for folder, share in shares.items()
        if folder not in parts
    ]
    if len(shares) < len(mixture.shares):
        problems.append(Problem("CFG-203", "data.mixture.shares names a store twice.", "Give each store one share."))
    if len(parts) < len(listed):
        twice = next(folder for folder, count in Counter(folder for folder, *_ in listed).items() if count > 1)
        found = f"The features name {twice} twice, and data.mixture.shares has one share for each store."
        problems.append(Problem("CFG-203", found, "Name it once, and give it a share with repeats."))
    raise_all(ConfigError, problems)
    for folder, (first, part) in parts.items():
        yield folder, first, part, shares.get(folder)


def _store_name(folder: str) -> str:
    """Name of a store, however its folder or address is written."""
    found = location_of(folder, Storage())
    return os.path.realpath(found) if isinstance(found, Path) else found.url


def _buckets(first: int, part: FeatureDataset, *, by_shape: bool) -> dict[tuple[int, LatentShape], Bucket]:
    """The buckets of a source, by draw and shape; of each draw one, under any of its shapes, where samples need not be
    told apart.
    """
    several = by_shape and len(part.shapes()) > 1
    found: dict[tuple[int, LatentShape], Bucket] = {}
    for draw in range(part.draws):
        name, rows = f"samples from {first}" + (f", draw {draw}" if draw else ""), part.of_draw(draw)
        if several:
            for shape, size in rows.buckets().items():
                member, tokens = partial(_member, first, rows, shape), _tokens(part, shape)
                found[draw, shape] = Bucket(f"{name} of {list(shape)}", size, member, tokens, draw)
        elif len(rows):
            member = partial(_any_member, first, rows)
            found[draw, next(iter(rows.buckets()))] = Bucket(name, len(rows), member, _tokens(part, rows=rows), draw)
    return found


def _tokens(
    part: FeatureDataset, shape: LatentShape | None = None, *, rows: DatasetDraw | None = None
) -> Callable[[int], int]:
    """Tokens of the k-th sample of a shape, or of all of a draw."""
    if shape is not None or rows is None or len(part.shapes()) == 1:
        tokens = part.tokens_of(shape or next(iter(part.shapes())))
        return lambda _: tokens
    return lambda k: part.num_tokens(rows.member(k))


def _member(first: int, rows: DatasetDraw, shape: LatentShape, k: int) -> int:
    return first + rows.in_bucket(shape, k)


def _any_member(first: int, rows: DatasetDraw, k: int) -> int:
    return first + rows.member(k)


def _planned(source: SourceOfData, batches: BatchPlan) -> PlannedSource:
    buckets, share = list(source.buckets.values()), source.share
    if share is None:
        return PlannedSource(buckets, source.micro_batch_size, source.part.draws)
    begin, end = share.begin_step, share.end_step
    return PlannedSource(
        buckets,
        source.micro_batch_size,
        source.part.draws,
        share.repeats,
        Fraction(str(share.weight)),  # as it is written: 0.1 is a tenth
        begin * batches.groups_of_step,
        None if end is None else end * batches.groups_of_step,
        share.begin_epoch,
        share.end_epoch,
    )


def _too_small(source: SourceOfData, shape: LatentShape, bucket: Bucket, min_bucket: MinBucket) -> Problem:
    few, micro_batch = "1 sample" if bucket.size == 1 else f"{bucket.size} samples", source.micro_batch_size
    return Problem(
        "DATA-015",
        f"{few} of {source.where} have latents {list(shape)}, and a micro-batch takes {micro_batch} of one shape.",
        "Add samples of that shape, take smaller micro-batches, or set data.min_bucket to "
        + ("repeat; with drop no sample is left." if min_bucket == "drop" else "drop or repeat."),
    )
