"""Settling on a plan: the store's where it still holds, else a new one in its place, written by one process."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mm.config.bad_samples import OnBadSample
from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.extraction import ExtractionRun
from mm.config.tasks.task import Entry, Sizes
from mm.data.recipe import Recipe
from mm.data.shapes.choose import most_pixels
from mm.data.sources.checking import RowReader
from mm.errors import DataError
from mm.extract.claims import Claims
from mm.extract.draft import PlanFacts, draft_plan
from mm.extract.plan import Plan, install, open_plan
from mm.extract.rows import check_rows, look
from mm.extract.store import prepare_recipe, present_shards, unfinish

log = logging.getLogger(__name__)

SHARD_BYTES = 512 * 10**6
FEWEST_SHARDS = 64
LATENT_CHANNELS = 16
"""Of tasks that do not say another number."""
_TEXT_BYTES = 500_000  # a caption of 60 tokens, 4096 numbers of 2 bytes each
_PLANNING = "plan"


def settle_plan(
    run: ExtractionRun, store: Path, recipe: Recipe, reader: RowReader, claims: Claims, policy: OnBadSample
) -> Plan:
    """The plan of the rows as they are now.

    Args:
        run: the extraction. store: its folder, which is there. recipe: of the features. reader: the rows.
        claims: of this process. policy: for bad samples.

    Raises:
        DataError: what is wrong with the rows (`mm.extract.draft.draft_plan`, `mm.extract.rows.check_rows`), DATA-191
            where another process plans and comes to no end, DATA-192 for fewer draws than the store has.
    """
    clip, most_s = run.data.clip, run.supervision.timeout_minutes * 60.0
    facts = PlanFacts(recipe.key, partial(shard_rows, run), run.extraction.draws, _inputs(run, reader))

    def draft() -> Path:
        return draft_plan(store, reader, facts, partial(check_rows, clip=clip, policy=policy), partial(look, clip=clip))

    while True:
        known = open_plan(store)
        if known is not None and known.recipe == recipe.key:
            if not known.looked and facts.inputs is not None and known.inputs == facts.inputs:
                return known
            with _drafted(draft) as folder:
                if open_plan(store, folder) == known:
                    return known
                with claims.waiting_for(_PLANNING, most_s):
                    _check_what_goes(run, store, folder)
                    return _put(store, recipe, folder)
        with claims.waiting_for(_PLANNING, most_s):
            known = open_plan(store)
            if known is None or known.recipe != recipe.key:  # else another process was faster
                with _drafted(draft) as folder:
                    return _put(store, recipe, folder)


def shard_rows(run: ExtractionRun, num_rows: int) -> int:
    """Rows of a shard: as many as are asked for, else as make 512 MB by what their latents and captions may take, and
    of small tables fewer, a power of two that gives 64 shards and more, so that many workers find something to do.
    """
    if run.extraction.shard_rows is not None:
        return run.extraction.shard_rows
    of_latents = run.task.latent_channels or LATENT_CHANNELS
    sizes = Sizes(of_latents, (1, 1, 1), 0, 0)
    entries = (Entry.CHANNELS, Entry.SIDE_BLOCKS)
    added = (feature for entry in entries for feature in run.task.entering(entry))
    channels = of_latents + sum(feature.shape(sizes)[0] for feature in added)
    numbers = channels * most_pixels(run.data.clip) // (TEMPORAL_STRIDE * run.task.latent_pixels**2)
    sample_bytes = numbers * (4 if run.encoders.vae.precision == "fp32" else 2) + _TEXT_BYTES
    few = 1 << max(0, (num_rows // FEWEST_SHARDS).bit_length() - 1)
    return max(1, min(SHARD_BYTES // sample_bytes, few))


def _check_what_goes(run: ExtractionRun, store: Path, folder: Path) -> None:
    """Refuse a plan with fewer draws than the store's, unless features may be replaced; tell of one with fewer rows.

    Raises:
        DataError: DATA-192.
    """
    known, draft = open_plan(store), open_plan(store, folder)
    if known is None or draft is None or not present_shards(store):
        return
    if draft.num_rows < known.num_rows:
        message = "%s was made of %d rows, and %d are listed now: the samples of the others go when it is finished"
        log.warning(message, store, known.num_rows, draft.num_rows)
    if draft.draws < known.draws and not run.output.overwrite:
        words = run.origins
        anew = words["output.overwrite"].with_value(True)
        found = f"{store} has {known.draws} draws of each sample, and {draft.draws} are asked for: the others would go."
        remedy = f"Set {words['extraction.draws'].with_value(known.draws)}; or {anew} to drop them."
        raise DataError("DATA-192", found, remedy)


def _put(store: Path, recipe: Recipe, folder: Path) -> Plan:
    """Make a draft the store's plan, unless another process has just written the same."""
    known = open_plan(store)
    if known is not None and known == open_plan(store, folder):
        return known
    prepare_recipe(store, recipe)
    unfinish(store)
    return install(store, folder)


@contextmanager
def _drafted(draft: Callable[[], Path]) -> Iterator[Path]:
    """A draft, which is removed in the end unless it was renamed."""
    folder = draft()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _inputs(run: ExtractionRun, reader: RowReader) -> str | None:
    """A word that changes when the tables do, or how they are read; None where a source is more than its table."""
    digest = hashlib.blake2b(digest_size=16)
    for source, is_table in zip(reader.sources, reader.are_tables(), strict=True):
        if not is_table:
            return None
        content = hashlib.blake2b()
        with open(source.annotation, "rb") as file:
            while chunk := file.read(2**20):
                content.update(chunk)
        said = [source.format, source.file_keys, content.hexdigest(), run.extraction.shard_rows, run.extraction.draws]
        digest.update(json.dumps(said).encode())
    return digest.hexdigest()
