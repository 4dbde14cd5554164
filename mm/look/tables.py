"""Tables about all samples: sources, buckets, histograms, what was left out; from catalogs, not from samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mm.config.run.data import SourceShare
from mm.config.storage import Location
from mm.data.balance import cost_of_model
from mm.data.dataset import FeatureDataset
from mm.data.listing import LatentShape
from mm.data.plan import SamplingPlan
from mm.data.planning import SourceOfData
from mm.data.recipe import UNKNOWN, Recipe
from mm.data.remote.reading import exists, open_lines
from mm.errors import DataError
from mm.extract.skipping import SKIPPED
from mm.look.facts import BucketRow, Histogram, Skipped, SourceRow
from mm.look.samples import Drawing, pixel_size

MOST_CAPTIONS = 4096
"""Captions whose lengths are counted."""
COUNTED_IN_SHAPES = " An image in front of a clip counts as four frames of its shape."
_RUNS = 64  # of neighbouring samples among them: neighbours are in one shard
_BARS = 12
_SHOWN = 20


def source_rows(dataset: FeatureDataset, drawing: Drawing, plan: SamplingPlan) -> tuple[str, list[SourceRow]]:
    """The sources of the mixture with their shares, and the stretch of training over which these are counted."""
    sources = list(_sources(dataset, drawing))
    if drawing.steps is not None:
        slots = drawing.steps * drawing.batches.groups_of_step
        stretch = f"the whole training, {drawing.steps:,} steps"
    else:
        groups_of_epoch = sum(_of_epoch(source) // source.micro_batch_size for source in sources)
        slots, stretch = max(1, groups_of_epoch), "one epoch of all"
    filled = plan.groups_of_sources(slots)
    rows = []
    for source, groups in zip(sources, filled, strict=True):
        samples = _samples(source)
        passes = groups * source.micro_batch_size / samples
        rows.append(SourceRow(source.where, samples, asked(source.share), groups / slots, passes))
    return stretch, rows


def asked(share: SourceShare | None) -> str:
    """A source's share as it was asked for, in words."""
    if share is None:
        return "as large as it is"
    words = [
        f"weight {share.weight:g}" if share.weight != 1 else "",
        f"{share.repeats} passes an epoch" if share.repeats != 1 else "",
        f"micro-batches of {share.micro_batch_size}" if share.micro_batch_size is not None else "",
        f"from step {share.begin_step:,}" if share.begin_step else "",
        f"until step {share.end_step:,}" if share.end_step is not None else "",
        f"after epoch {share.begin_epoch:,}" if share.begin_epoch else "",
        f"until epoch {share.end_epoch:,}" if share.end_epoch is not None else "",
    ]
    return ", ".join(word for word in words if word) or "as large as it is"


def bucket_rows(dataset: FeatureDataset, drawing: Drawing, sources: Sequence[SourceRow]) -> list[BucketRow]:
    """Samples of each shape of each source, the dearest together first.

    Args:
        dataset: the features. drawing: what is drawn of them. sources: the sources' shares, from `source_rows`.
    """
    cost, sizes, draws = cost_of_model(dataset.model), dict[str, int](), dict[str, int]()
    found: list[tuple[str, LatentShape, int, bool]] = []
    for source in drawing.sources_of(dataset):
        sizes[source.where], draws[source.where] = source.micro_batch_size, source.part.draws
        for shape, count in source.part.buckets().items():
            is_small = any(shape == one for _, one in source.small)
            left_out = not source.buckets or (is_small and not any(shape == one for _, one in source.buckets))
            found.append((source.where, shape, count, left_out))
    of_sample = {row.name: row.share * sizes[row.name] / row.samples for row in sources}
    parts = [0.0 if left_out else of_sample[name] * count / draws[name] for name, _, count, left_out in found]
    costs = [part * cost(dataset.tokens_of(shape)) for part, (_, shape, _, _) in zip(parts, found, strict=True)]
    rows = [
        BucketRow(
            source=name,
            size=pixel_size(shape, dataset.model.task),
            samples=count,
            tokens=dataset.tokens_of(shape),
            cost=cost(dataset.tokens_of(shape)),
            share_of_samples=part / (sum(parts) or 1),
            share_of_cost=of_cost / (sum(costs) or 1),
            micro_batches=count / sizes[name],
            left_out=left_out,
        )
        for (name, shape, count, left_out), part, of_cost in zip(found, parts, costs, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.share_of_cost)


def histograms(dataset: FeatureDataset) -> list[Histogram]:
    """Counts of sizes and lengths of all samples, and of captions' tokens of some of them."""
    sizes: Counter[tuple[int, int]] = Counter()
    lengths: Counter[int] = Counter()
    for shape, count in dataset.shapes().items():
        frames, height, width = pixel_size(shape, dataset.model.task)
        sizes[height, width] += count
        lengths[frames] += count
    everything = f"of all {len(dataset):,} samples"
    in_front = "; an image in front of a clip counts as four" if dataset.model.task.most_in_front else ""
    commonest = sorted(sizes.most_common(_BARS))
    others = sum(sizes.values()) - sum(count for _, count in commonest)
    of_sizes = [(f"{height} x {width}", count) for (height, width), count in commonest]
    of_sizes += [(f"{len(sizes) - _BARS} others", others)] if others else []
    return [
        Histogram("Sizes, height x width", of_sizes, everything),
        Histogram(
            "Frames", [(f"{frames:,}", count) for frames, count in sorted(lengths.items())], everything + in_front
        ),
        _caption_lengths(dataset),
    ]


def _caption_lengths(dataset: FeatureDataset) -> Histogram:
    """Tokens of captions, of all of them or of evenly spaced runs of neighbours."""
    indices = list(spread(len(dataset), MOST_CAPTIONS, _RUNS))
    counts = Counter(dataset.text_tokens(index) for index in indices)
    note = f"of all {len(dataset):,} samples"
    if len(indices) < len(dataset):
        note = f"of {len(indices):,} samples in {_RUNS} places, of {len(dataset):,}"
    return Histogram("Tokens of captions", in_bins(counts), note)


def spread(count: int, most: int, runs: int) -> Iterator[int]:
    """Some of `count` numbers, at most `most`: all of them, or runs of neighbours that begin evenly spaced."""
    if count <= most:
        yield from range(count)
        return
    length = most // runs
    for run in range(runs):
        begin = run * (count - length) // (runs - 1)
        yield from range(begin, begin + length)


def in_bins(counts: Counter[int]) -> list[tuple[str, int]]:
    """Counts of numbers in at most so many bins of one width, empty ones included."""
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // _BARS)
    bins: list[tuple[str, int]] = []
    for begin in range(low, high + 1, width):
        label = f"{begin}" if width == 1 else f"{begin} to {begin + width - 1}"
        bins.append((label, sum(counts[number] for number in range(begin, begin + width))))
    return bins


def skipped_of(store: Location) -> Skipped | None:
    """Clips that extraction left out of a store; None where it left out none, or does not say so.

    Raises:
        DataError: DATA-010 for a list of them that cannot be read.
    """
    path = store / SKIPPED
    if not exists(path):
        return None
    by_error: Counter[str] = Counter()
    first: list[tuple[str, str, str]] = []
    try:
        with open_lines(path) as lines:
            for line in lines:
                row = json.loads(line)
                by_error[str(row["error"])] += 1
                if len(first) < _SHOWN:
                    first.append((str(row["sample"]), str(row["error"]), str(row["reason"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path} cannot be read as a list of clips that were left out ({error})."
        raise DataError("DATA-010", message, "Remove it, or run the extraction again.") from None
    return Skipped(str(store), dict(by_error.most_common()), first)


def small_in_words(dataset: FeatureDataset, drawing: Drawing) -> str:
    """Words for what becomes of shapes of which there are fewer samples than a micro-batch takes."""
    sizes = drawing.mixture.sizes(drawing.batches.micro_batch_size)
    if max(sizes) == 1:
        return "A micro-batch is one sample, so that no shape has too few."
    takes = f"a micro-batch takes {', '.join(map(str, sorted(sizes)))}"
    small = [shape for source in drawing.sources_of(dataset) for shape in source.small]
    few = [count for count, size in _counts(dataset, drawing) if count < size]
    if not few:
        return f"Every shape has enough samples: {takes}."
    if small:
        return f"{len(small)} shapes with {sum(few):,} samples are left out: {takes} of one shape."
    return f"{len(few)} shapes have too few samples ({takes}): some come in it several times."


def recipe_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """A recipe in words."""
    clip = f"at most {recipe.num_frames}" if recipe.min_num_frames or recipe.shape else f"{recipe.num_frames}"
    every = "" if recipe.frame_interval == 1 else f", every {recipe.frame_interval}. of the source"
    size = f"{recipe.height} x {recipe.width}" if recipe.shape is None else _rule(recipe.shape)
    rows = [
        ("task", recipe.task),
        ("frames", f"{clip}{every}" + (f"; {_rule(recipe.frames)}" if recipe.frames else "")),
        ("size", f"{size}; {recipe.crop}"),
        ("VAE", f"{recipe.vae}, in {recipe.vae_dtype}, {_tiles(recipe.tile_size, recipe.tile_stride)}"),
        ("text encoder", f"{recipe.text_encoder}, in {recipe.text_dtype}"),
        ("captions", f"tokenizer {recipe.tokenizer}; {recipe.text_cleaning}; at most {recipe.max_text_tokens} tokens"),
        ("seed", str(recipe.seed)),
    ]
    if recipe.image_encoder is not None:
        tiles = _tiles(recipe.condition_tile_size, recipe.condition_tile_stride)
        rows.append(("image encoder", f"{recipe.image_encoder}; given frames encoded {tiles}"))
    if recipe.vae == UNKNOWN:
        rows.append(("origin", "taken over from another system, which does not say the weights"))
    return [*rows, ("key", recipe.key)]


def _rule(values: dict[str, Any]) -> str:
    given = {name: value for name, value in values.items() if value is not None and name != "rule"}
    words = ", ".join(f"{name} {value}" for name, value in given.items())
    return f"{values['rule']}: {words}" if "rule" in values else words


def _tiles(size: tuple[int, int] | None, stride: tuple[int, int] | None) -> str:
    if size is None or stride is None:
        return "whole frames"
    return f"in tiles of {size[0]} x {size[1]} latent pixels every {stride[0]} x {stride[1]}"


def _sources(dataset: FeatureDataset, drawing: Drawing) -> Iterator[SourceOfData]:
    """The sources that are in the plan, in its order."""
    for source in drawing.sources_of(dataset):
        if source.buckets:
            yield source


def _of_epoch(source: SourceOfData) -> int:
    repeats = 1 if source.share is None else source.share.repeats
    return repeats * _samples(source)


def _samples(source: SourceOfData) -> int:
    """Samples that are in the plan, each counted once however many draws it has."""
    return max(1, sum(bucket.size for bucket in source.buckets.values()) // source.part.draws)


def _counts(dataset: FeatureDataset, drawing: Drawing) -> Iterator[tuple[int, int]]:
    """Samples of each shape of the sources that have several, and of a micro-batch."""
    for source in drawing.sources_of(dataset):
        if len(source.part.buckets()) > 1:
            yield from ((count, source.micro_batch_size) for count in source.part.buckets().values())
