"""Feature extraction: every video and caption through its encoder once, to a store of shards that training reads.

The rows are cut into runs by a plan (plan.py); any number of processes claim runs (claims.py), make their shards
(shard.py) and come and go. None waits for another: whoever finds that all shards are there finishes the store.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from mm.checkpoint.encoder_paths import image_encoder, text_encoder, video_encoder
from mm.config.bad_samples import parse_on_bad_sample
from mm.config.data import NOT_WITH_DECORD
from mm.config.run.encoders import EncodersSection
from mm.config.run.extraction import ExtractionRun
from mm.config.tasks.task import Task
from mm.data.files import make_folder
from mm.data.recipe import extraction_recipe
from mm.data.sources.checking import RowReader, annotated_sources
from mm.data.store.captions import CAPTIONS
from mm.data.store.catalog import MANIFEST, Manifest, is_sharded, read_manifest
from mm.extract.captions import captions_of_clips, make_captions
from mm.extract.claims import CLAIMS, Claims
from mm.extract.encode import ClipEncoder
from mm.extract.planning import settle_plan
from mm.extract.shard import ShardMaker
from mm.extract.skipping import SKIPPED, SKIPS, Skipping, num_skipped
from mm.extract.sources import VisualEncoders
from mm.extract.store import WORK, check_store, finish, held_by_others, hold_against_plan, runs_done
from mm.extract.worker import Runs, Tally, Worker
from mm.wan.encoders import VideoEncoder, require_stride

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """Report of one process.

    Attributes:
        listed: samples of the finished store; 0 where other processes still work on it.
        encoded: samples that this process encoded. reused: those that were complete before.
        skipped: clips left out of the finished store, or else by this process.
    """

    listed: int
    encoded: int
    reused: int
    skipped: int = 0


def extract(run: ExtractionRun, *, device: torch.device, rank: int = 0, world_size: int = 1) -> ExtractReport:
    """Run one process's part of the extraction.

    Args:
        run: which clips, the encoders, where to write. What `mm.config.rules.extraction.check_extraction` refuses must
            not come here.
        device: where the encoders run.
        rank, world_size: this process and how many were started with it; they begin in different places.

    Raises:
        ConfigError: CFG-054 for the list of data sets.
        DataError: for annotations (all problems at once, before any work), a video, the weights, a store made with
            another recipe (DATA-014), or more bad videos than may be left out (DATA-073). The store keeps what is
            complete and has no manifest.
    """
    words = run.origins
    policy = parse_on_bad_sample(run.data.on_bad_sample, words["data.on_bad_sample"].name)
    recipe, store = extraction_recipe(run), Path(run.output.path)
    check_store(store, recipe, run.output.overwrite, words)
    reader, captions = RowReader(annotated_sources(run.data), run.task), captions_of_clips(run)
    with _made(store, words["output.path"].place()), Claims(store / WORK / CLAIMS) as claims:
        plan = settle_plan(run, store, recipe, reader, claims, policy)
        skipping = Skipping(policy, plan.num_rows, store / WORK / SKIPS)
        hold_against_plan(store, plan, skipping)
        manifest, tally = (read_manifest(store) if is_sharded(store) else None), Tally()
        encoders = cache(partial(open_encoders, run.encoders, run.task, device))
        if captions and claims.take(CAPTIONS):
            made = make_captions(store, captions, recipe, encoders)
            claims.give_back(CAPTIONS)
            log.info("%d of %d captions of clips were encoded into %s", made, len(captions), store / CAPTIONS)
        if manifest is None:
            done, skips = runs_done(store, plan), skipping.counts()
            complete = sum(plan.rows_in(row) - skips.get(row, 0) for row in done)
            worker = Worker(run, store, plan, reader, ShardMaker(store, plan, recipe, encoders), skipping)
            tally = worker.tally
            runs = Runs(store, plan, claims, run.extraction.share, rank * plan.num_runs // world_size)
            total, before = plan.num_rows, sum(map(plan.rows_in, done))
            with tqdm(total=total, initial=before, desc="features", unit="sample", disable=rank > 0 or None) as bar:
                worker.work(runs, claims, bar)
            manifest = finish(store, plan, policy)
        else:
            complete = manifest.samples // manifest.draws
    if run.data.clip.reader == "decord" and tally.readers["pyav"]:
        log.warning("%d of %d clips: %s", tally.readers["pyav"], tally.readers.total(), NOT_WITH_DECORD)
    return _report(store, manifest, tally, complete, rank)


@contextlib.contextmanager
def _made(store: Path, name: str) -> Iterator[None]:
    """Make a store's folder; where nothing came into it, it is removed again."""
    make_folder(store, name)
    try:
        yield
    finally:
        for folder in (store / WORK / CLAIMS, store / WORK, store):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _report(store: Path, manifest: Manifest | None, tally: Tally, complete: int, rank: int) -> ExtractReport:
    """Tell what was done; where several processes were started together, the first one, or who finished the store."""
    reused = complete + tally.copied
    if manifest is None:
        others = held_by_others(store)
        left = f"{others} shards are in the hands of others, of which one finishes it" if others else "others are left"
        log.info("this process encoded %d samples; %s is not finished: %s", tally.encoded, store, left)
        return ExtractReport(0, tally.encoded, reused, tally.skipped)
    done = f"this process encoded {tally.encoded}, {reused} samples were complete before"
    if not tally.encoded:
        done = "nothing was left to encode"
    if rank == 0 or tally.runs:
        log.info("%d samples are listed in %s; %s", manifest.samples, store / MANIFEST, done)
    skipped = num_skipped(store)
    if skipped and (rank == 0 or tally.runs):
        log.warning("%d clips cannot be read and are left out; see %s", skipped, store / SKIPPED)
    return ExtractReport(manifest.samples, tally.encoded, reused, skipped)


def open_encoders(named: EncodersSection, task: Task, device: torch.device) -> ClipEncoder:
    """Load all encoders of an extraction.

    Raises:
        DataError: DATA-040 to DATA-042 for one that cannot be loaded, DATA-045 for one of another model.
    """
    vae = named.vae
    video = video_encoder(Path(vae.from_pretrained), vae.precision, device, vae.tiles_of_clips())
    require_stride(vae.from_pretrained, video, task)
    text = text_encoder(
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
    image = image_encoder(Path(folder), named.image_precision, device)
    return ClipEncoder(text, VisualEncoders(task, video, conditions, image, folder))
