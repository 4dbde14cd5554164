"""The sampling plan of a data set of feature stores."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

from mm.config.run.data import MinBucket, Mixture, SourceShare
from mm.config.step import AS_LISTED
from mm.data.dataset import FeatureDataset
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
        ConfigError: CFG-203 for a share of no store or two of one, CFG-204 where at some step no store is open.
        DataError: DATA-015 for buckets smaller than a micro-batch, or when leaving them out leaves nothing.
    """
    sources: list[PlannedSource] = []
    small: list[Problem] = []
    by_shape = _by_shape(dataset, batches.micro_batch_size, shuffle=shuffle)
    for where, first, part, share in _parts(dataset, mixture):
        buckets = _buckets(first, part, by_shape=by_shape)
        if min_bucket != "repeat" and len(buckets) > 1:
            few = {shape for shape, bucket in buckets.items() if bucket.size < batches.micro_batch_size}
            small += [_too_small(where, shape, buckets.pop(shape), batches, min_bucket) for shape in sorted(few)]
        if buckets:
            sources.append(_source(list(buckets.values()), share, batches))
    if min_bucket == "error" or not sources:
        raise_limited(small)
    for problem in small:
        logger.warning("left out: %s", problem.message)
    _tell_of_late_shares(mixture, num_steps)
    plan = SamplingPlan(sources, batches.micro_batch_size, seed, shuffle=shuffle)
    if plan.end is not None and (num_steps is None or plan.end < num_steps * batches.groups_of_step):
        message = f"In data.mixture.shares no store is open at step {plan.end // batches.groups_of_step}."
        raise ConfigError("CFG-204", message, "Let the shares' begin_step and end_step leave no gap.")
    return plan


def _tell_of_late_shares(mixture: Mixture, num_steps: int | None) -> None:
    for share in mixture.shares:
        if num_steps is not None and share.begin_step >= num_steps:
            message = "%s comes after step %d, and the run ends with step %d: none of its samples are trained on"
            logger.warning(message, share.folder, share.begin_step, num_steps)


def describe_plan(
    dataset: FeatureDataset,
    mixture: Mixture,
    micro_batch_size: int,
    *,
    shuffle: bool,
    min_bucket: MinBucket = "error",
) -> str:
    """Words for what decides the order beside the data set and the seed, which are compared on resume.

    Stores are told by their place in the list, since where they lie does not matter. Raises CFG-203 as `sampling_plan`.
    """
    words = [_ORDER if shuffle else AS_LISTED]
    if _by_shape(dataset, micro_batch_size, shuffle=shuffle):
        small = f", small ones: {min_bucket}" if micro_batch_size > 1 else ""
        words.append(f"groups of {micro_batch_size} samples of a shape{small}")
    elif mixture.shares:
        words.append(f"groups of {micro_batch_size}")
    if mixture.shares:
        words.append("stores mixed, each in its own order")
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
    shares = {os.path.realpath(share.folder): share for share in mixture.shares}
    listed = [(os.path.realpath(folder), first, part) for folder, first, part in dataset.parts()]
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


def _by_shape(dataset: FeatureDataset, micro_batch_size: int, *, shuffle: bool) -> bool:
    """Tell whether samples of a source are told apart by their shapes."""
    return len(dataset.shapes()) > 1 and (shuffle or micro_batch_size > 1)


def _buckets(first: int, part: FeatureDataset, *, by_shape: bool) -> dict[LatentShape, Bucket]:
    """The buckets of a source; one of all its samples, under any of their shapes, where they need not be told apart."""
    shapes = part.buckets()
    if not by_shape or len(shapes) == 1:
        name, shape = f"samples from {first}", next(iter(shapes))
        return {shape: Bucket(name, len(part), lambda k: first + k, _tokens(part))}
    return {
        shape: Bucket(
            f"samples from {first} of {list(shape)}", size, partial(_member, first, part, shape), _tokens(part, shape)
        )
        for shape, size in shapes.items()
    }


def _tokens(part: FeatureDataset, shape: LatentShape | None = None) -> Callable[[int], int]:
    """Tokens of the k-th sample of a shape, or of all."""
    shapes = part.shapes() if shape is None else [shape]
    if len(shapes) > 1:
        return part.num_tokens
    (tokens,) = map(part.tokens_of, shapes)
    return lambda _: tokens


def _member(first: int, part: FeatureDataset, shape: LatentShape, k: int) -> int:
    return first + part.in_bucket(shape, k)


def _source(buckets: list[Bucket], share: SourceShare | None, batches: BatchPlan) -> PlannedSource:
    if share is None:
        return PlannedSource(buckets)
    begin, end = share.begin_step, share.end_step
    return PlannedSource(
        buckets,
        share.repeats,
        Fraction(str(share.weight)),  # as it is written: 0.1 is a tenth
        begin * batches.groups_of_step,
        None if end is None else end * batches.groups_of_step,
    )


def _too_small(where: str, shape: LatentShape, bucket: Bucket, batches: BatchPlan, min_bucket: MinBucket) -> Problem:
    few, micro_batch = "1 sample" if bucket.size == 1 else f"{bucket.size} samples", batches.micro_batch_size
    return Problem(
        "DATA-015",
        f"{few} of {where} have latents {list(shape)}, and a micro-batch takes {micro_batch} of one shape.",
        "Add samples of that shape, take smaller micro-batches, or set data.min_bucket to "
        + ("repeat; with drop no sample is left." if min_bucket == "drop" else "drop or repeat."),
    )
