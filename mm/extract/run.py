"""Feature extraction: every video and caption through its encoder once, to files that training reads.

Each process encodes its share of the samples and skips what is complete, so an interrupted run goes on where it was.
The first process writes the list of samples when all are on disk; where the list is, the store is complete.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.data import NOT_WITH_DECORD
from mm.config.run.encoders import EncodersSection
from mm.config.run.extraction import ExtractionRun
from mm.config.tasks.task import Task
from mm.data.clips import Clip, read_clips
from mm.data.features import (
    EMPTY_PROMPT,
    EMPTY_PROMPT_ID,
    FEATURES,
    LISTING,
    Origin,
    is_complete,
    text_hash,
    write_feature,
)
from mm.data.recipe import extraction_recipe
from mm.data.sources.checking import annotated_sources, check_rows
from mm.errors import DataError
from mm.extract.encode import ClipEncoder
from mm.extract.skipping import SKIPPED, BadClip, Skipping, may_be_skipped, num_skipped
from mm.extract.sources import VisualEncoders
from mm.extract.store import ExtractionTask, Unreadable, check_plan, check_store, commit, plan, prepare
from mm.wan.encoders import TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """Report of one process.

    Attributes:
        listed: samples of all processes, now in data.jsonl.
        encoded: samples this process encoded. reused: samples of its share that were complete before.
        skipped: samples of its share that were left out.
    """

    listed: int
    encoded: int
    reused: int
    skipped: int = 0


def _alone() -> None:
    """The barrier of a single process."""


def extract(
    run: ExtractionRun,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = _alone,
) -> ExtractReport:
    """Run one process's part of the extraction.

    Args:
        run: which clips, the encoders, where to write. What `mm.config.rules.extraction.check_extraction` refuses must
            not come here.
        device: where the encoders run.
        rank, world_size: this process and how many there are; they take every `world_size`-th sample.
        barrier: returns when all processes have called it.

    Raises:
        ConfigError: CFG-054 for the list of data sets.
        DataError: for annotations (all problems at once, before any work), a video, the weights, a store made with
            another recipe (DATA-014), or more bad videos than may be left out (DATA-073). The store keeps what is
            complete and has no data.jsonl.
    """
    preprocess, seed, words = run.data.clip, run.extraction.seed, run.origins
    on_bad_sample = parse_on_bad_sample(run.data.on_bad_sample, words["data.on_bad_sample"].name)
    rows = check_rows(annotated_sources(run.data), run.task)
    check_plan(rows, preprocess, on_bad_sample)
    recipe = extraction_recipe(run)
    store = Path(run.output.path)
    check_store(store, recipe, run.output.overwrite, words)
    mine = [plan(row, store, preprocess, recipe, seed) for row in rows[rank::world_size]]
    empty = Origin(EMPTY_PROMPT_ID, recipe.key, text_hash(""), "")
    everything = [plan(row, store, preprocess, recipe, seed) for row in rows] if rank == 0 else []
    if rank == 0:
        prepare(store, recipe, everything, empty, words)
    barrier()
    skipping = Skipping(on_bad_sample, len(rows), store)
    for item in mine:
        if isinstance(item, Unreadable):
            skipping.add(item.clip)
    todo = [item for item in mine if isinstance(item, ExtractionTask) and not is_complete(item.file, item.origin)]
    known_bad = skipping.count
    empty_file = store / FEATURES / EMPTY_PROMPT
    empty_is_missing = rank == 0 and not is_complete(empty_file, empty)
    if todo or empty_is_missing:
        encoders = _open_encoders(run.encoders, run.task, device)
        if empty_is_missing:
            write_feature(empty_file, encoders.text_only(""), empty, recipe.max_text_tokens)
        clips = read_clips(
            [item.sample for item in todo],
            preprocess,
            seed,
            num_workers=run.data.workers,
            time_limit=run.data.read_timeout,
        )
        bar = tqdm(
            total=len(mine), initial=len(mine) - len(todo), desc="features", unit="sample", disable=rank > 0 or None
        )
        with bar, closing(clips):
            readers = _encode_all(todo, clips, encoders, skipping, recipe.max_text_tokens, bar)
        if preprocess.reader == "decord" and readers["pyav"]:
            log.warning("%d of %d clips: %s", readers["pyav"], readers.total(), NOT_WITH_DECORD)
    barrier()
    if rank == 0:
        commit(store, everything, empty, recipe, on_bad_sample)
    barrier()
    skipped = num_skipped(store)
    encoded = len(todo) - (skipping.count - known_bad)
    report = ExtractReport(len(rows) - skipped, encoded, len(mine) - len(todo) - known_bad, skipping.count)
    if rank == 0:
        _tell(report, store, skipped)
    return report


def _open_encoders(named: EncodersSection, task: Task, device: torch.device) -> ClipEncoder:
    """Load all encoders of an extraction.

    Raises:
        DataError: DATA-040 to DATA-042 for one that cannot be loaded, DATA-045 for one of another model.
    """
    vae = named.vae
    video = VideoEncoder.from_pretrained(Path(vae.from_pretrained), vae.precision, device, vae.tiles_of_clips())
    text = TextEncoder.from_pretrained(
        Path(named.text.from_pretrained),
        Path(named.tokenizer.from_pretrained),
        named.text.precision,
        device,
        named.tokenizer.model_max_length,
    )
    conditions = VideoEncoder(video.vae, vae.tiles_of_conditions())
    if named.image is None:
        return ClipEncoder(text, VisualEncoders(task, video, conditions))
    folder = named.image.from_pretrained
    image = ImageEncoder.from_pretrained(Path(folder), named.image_precision, device)
    return ClipEncoder(text, VisualEncoders(task, video, conditions, image, folder))


def _encode_all(
    todo: Sequence[ExtractionTask],
    clips: Iterable[Clip | DataError],
    encoders: ClipEncoder,
    skipping: Skipping,
    text_len: int,
    bar: Any,
) -> Counter[str]:
    """Encode clips in their order; returns how many of them each library read."""
    readers: Counter[str] = Counter()
    for task, clip in zip(todo, clips, strict=True):
        if not isinstance(clip, DataError):
            write_feature(task.file, encoders.encode(clip, task.caption, task.sample.columns), task.origin, text_len)
            readers[clip.read_by] += 1
        elif may_be_skipped(clip):
            skipping.add(BadClip.of(task.sample.id, task.sample.file, clip.problems[0]))
        else:
            raise clip
        bar.update()
    return readers


def _tell(report: ExtractReport, store: Path, skipped: int) -> None:
    done = f"this process encoded {report.encoded}, {report.reused} of its samples were complete before"
    if not report.encoded:
        done = "nothing was left to encode"
    log.info("%d samples are listed in %s; %s", report.listed, store / LISTING, done)
    if skipped:
        log.warning("%d clips cannot be read and are left out; see %s", skipped, store / SKIPPED)
