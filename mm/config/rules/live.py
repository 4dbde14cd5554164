"""Rules about features that are made while training goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mm.config.data import TEMPORAL_STRIDE, store_sources
from mm.config.rules.extraction import EXTRACTION_RULES
from mm.config.run.data import Clip
from mm.config.run.extraction import ExtractionRun
from mm.config.run.file import load_run, of_kind
from mm.config.run.training import TrainingRun
from mm.config.storage import Remote
from mm.config.units import format_bytes, parse_bytes
from mm.config.unread import broken, is_given
from mm.errors import ConfigError, Problem

_LISTING = "data.jsonl"
_FEWEST_BYTES = 32 * 2**10


def live_extractions(run: TrainingRun) -> list[ExtractionRun]:
    """The extractions whose features a training makes.

    Raises:
        ConfigError: what reading their files raises, CFG-194 for a file of another kind of run.
    """
    if run.live is None:
        return []
    return [of_kind(load_run(Path(file)), ExtractionRun) for file in run.live.extractions]


def budget_bytes(run: TrainingRun) -> int | None:
    """Bytes that kept features may take; None for no limit. Raises ValueError for a text that says no size."""
    return None if run.live is None or run.live.budget is None else parse_bytes(run.live.budget)


def _extractions_can_be(run: TrainingRun) -> Iterator[Problem]:
    """CFG-241 to CFG-243, and all that is wrong with the extractions themselves."""
    if run.live is None:
        return
    word, seen = run.origins["live.extractions"], dict[str, str]()
    for file in run.live.extractions:
        try:
            found = of_kind(load_run(Path(file)), ExtractionRun)
        except ConfigError as error:
            yield from error.problems
            continue
        problems = [*found.problems, *broken(EXTRACTION_RULES, found)]
        yield from problems
        yield from broken([_makes_what_is_trained_on], (run, found))
        if not problems:
            store = os.path.realpath(found.output.path)
            if store in seen:
                said = f"{word.name} names {seen[store]} and {file}, which write to one store, {found.output.path}."
                yield Problem("CFG-241", said, "Name one of them, or give each a store of its own.")
            seen[store] = file


def _makes_what_is_trained_on(both: tuple[TrainingRun, ExtractionRun]) -> Iterator[Problem]:
    """CFG-241: the store is trained on. CFG-242: its task is the model's. CFG-243: parts have no effect."""
    run, extraction = both
    words, features = extraction.origins, run.data.features
    place, task = words["output.path"], extraction.task.name
    try:
        sources = store_sources(features.path, features.folder, _LISTING, features.storage)
    except ConfigError:  # told by the rule of the list
        sources = []
    folders = {os.path.realpath(source.folder) for source in sources if not isinstance(source.folder, Remote)}
    if sources and os.path.realpath(extraction.output.path) not in folders:
        told = run.word("data.features.path")
        found = f"{place.place()} is {extraction.output.path}, and {told} names no such store."
        yield Problem("CFG-241", found, "Name it there: features that are made are trained on as those of that store.")
    if task != run.wan.task.name:
        found = f"{words['extraction.task'].place()} is {task}, and the model is {run.wan.task.name}."
        yield Problem("CFG-242", found, "Make them agree.")
    for name in ("shard_of", "negative_caption", "clip_prompts"):
        if getattr(extraction.extraction, name) is not None:
            found = f"{words[f'extraction.{name}'].place()} has no effect where features are made in training."
            yield Problem("CFG-243", found, "Remove it.")


def _budget_can_be(run: TrainingRun) -> Iterator[Problem]:
    """CFG-244: a size, and one that holds a sample of each replica."""
    if run.live is None or not is_given(run.live.budget):
        return
    word = run.origins["live.budget"]
    try:
        budget = parse_bytes(run.live.budget)
    except ValueError:
        found = f"{word.place()} is {run.live.budget!r}, and no size."
        yield Problem("CFG-244", found, "Give a number with kB, MB, GB, TB, or KiB to TiB: 20GB.")
        return
    least = _bytes_of_a_sample(run.data.features.clip, run) * (run.dp or 1)
    if budget < least:
        replicas = f", one for each of {run.dp} replicas" if (run.dp or 1) > 1 else ""
        found = f"{word.place()} is {run.live.budget}, less than the {format_bytes(least)} of a sample{replicas}."
        yield Problem("CFG-244", found, "Raise it, or remove it for no limit.")


def _bytes_of_a_sample(clip: Clip | None, run: TrainingRun) -> int:
    """Bytes of the latents of a clip of one size, and what a part takes beside them."""
    if clip is None or clip.shape is not None:
        return _FEWEST_BYTES
    height, width = clip.fixed_size
    frames = (clip.num_frames - 1) // TEMPORAL_STRIDE + 1
    pixels = run.wan.task.latent_pixels
    values = run.wan.noise_channels * frames * (height // pixels) * (width // pixels)
    return 2 * values + _FEWEST_BYTES


LIVE_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (_extractions_can_be, _budget_can_be)
