"""The store of an extraction: made ready, its plan settled, its shards held against the plan, and finished."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from pathlib import Path

from mm.config.bad_samples import OnBadSample
from mm.config.run.origins import Origins
from mm.data.features import FEATURES, LISTING
from mm.data.files import TEMPORARY_PREFIX, make_folder, raise_limited, write_atomically
from mm.data.recipe import RECIPE_FILE, Recipe, check_recipe, load_recipe, save_recipe
from mm.data.store.captions import CAPTIONS
from mm.data.store.catalog import MANIFEST, Manifest, finish_store, is_sharded
from mm.data.store.shard import BODY, INDEX, KIND, SHARDS, check_body, shard_folder
from mm.data.store.table import NO_DAMAGE, read_table_header
from mm.errors import DataError
from mm.extract.claims import CLAIMS, LEASE_S, Claim, all_claims
from mm.extract.former import FORMER, put_aside
from mm.extract.plan import PLAN, Plan
from mm.extract.skipping import SKIPPED, BadClip, Skipping, read_bad_clips, too_many, write_skipped

WORK = "work"
"""What workers tell each other: claims, clips left out, failures. It is there until the store is finished."""
_NUMBER = re.compile(r"[0-9]{8}")

log = logging.getLogger(__name__)


def check_store(store: Path, recipe: Recipe, overwrite: bool, words: Origins) -> None:
    """Refuse a store of another form or recipe.

    Raises:
        DataError: DATA-068 for a store of one file a sample, DATA-014 for one of another recipe.
    """
    place = words["output.path"].name
    if (store / LISTING).exists() or (store / FEATURES).is_dir():
        message = f"{store} is a store of one file a sample, and extraction writes shards."
        remedy = f"Give another {place}; or take it over with mm migrate shards, and go on in the store that it writes."
        if not (store / LISTING).exists():  # an interrupted extraction, which nothing takes over
            message = f"{store} has an unfinished store of one file a sample, and extraction writes shards."
            remedy = f"Give another {place}, and extract anew."
        raise DataError("DATA-068", message, remedy)
    if (store / RECIPE_FILE).exists() and not overwrite:
        anew = words["output.overwrite"].with_value(True)
        remedy = f"Give another {place}, the values and weights it was made with, or {anew} to make it anew."
        check_recipe(store, load_recipe(store), recipe.model_dump(), remedy)


def prepare_recipe(store: Path, recipe: Recipe) -> None:
    """Write the recipe of a store, and remove what was made with another.

    Raises:
        DataError: DATA-018 and DATA-019 when it cannot be written, DATA-010 for a recipe that cannot be read.
    """
    if (store / RECIPE_FILE).exists():
        if load_recipe(store) == recipe:
            return
        unfinish(store)
        work = store / WORK
        told = [path for path in work.iterdir() if path.name != CLAIMS] if work.is_dir() else []
        for path in (store / SHARDS, store / FORMER, store / PLAN, store / CAPTIONS, *told):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink(missing_ok=True)
    save_recipe(store, recipe)


def unfinish(store: Path) -> None:
    """Remove what says that a store is finished."""
    (store / MANIFEST).unlink(missing_ok=True)
    (store / SKIPPED).unlink(missing_ok=True)


def present_shards(store: Path) -> set[int]:
    """The shards that are there."""
    try:
        names = os.listdir(store / SHARDS)
    except FileNotFoundError:
        return set()
    return {int(name) for name in names if _NUMBER.fullmatch(name)}


def runs_done(store: Path, plan: Plan) -> set[int]:
    """The runs of which every shard is there."""
    present = present_shards(store)
    if plan.draws == 1:
        return {number for number in present if number < plan.num_runs}
    return {run for run in range(plan.num_runs) if present.issuperset(plan.shards_of(run))}


def hold_against_plan(store: Path, plan: Plan, skipping: Skipping) -> None:
    """Put shards aside that are cut off, or were made from other rows or files than they are planned for.

    That is done at every start where files are looked at, and else at the first start with a plan, and after a repair.

    Raises:
        DataError: DATA-018 and DATA-019 when nothing can be written there.
    """
    mark = store / WORK / f"held-{plan.key}"
    if not plan.looked and mark.exists():
        return
    lacking = {number: _skipped_as_planned(store, plan, number) for number in sorted(present_shards(store))}
    wrong = [number for number, skipped in lacking.items() if skipped is None]
    if wrong:
        unfinish(store)
        message = (
            "%d shards of %s are not as planned now (other rows, files or length, or damaged) and are made again; "
            "samples that are the same are copied"
        )
        log.info(message, len(wrong), store)
    for number in wrong:
        put_aside(store, number)
        skipping.forget(number)
    if not is_sharded(store):
        counts = skipping.counts()
        for number, skipped in lacking.items():
            if skipped and number not in counts:
                skipping.note(number, read_bad_clips(shard_folder(store, number) / SKIPPED))
        make_folder(mark.parent, "the store's folder")
        write_atomically(mark, [], 0)


def finish(store: Path, plan: Plan, policy: OnBadSample) -> Manifest | None:
    """Write the manifest of a store whose shards are all there and as planned; None where some are not.

    Any worker may do so, and two at once: they write the same. What workers told each other is removed.

    Raises:
        DataError: DATA-073 when more clips are bad than the policy allows, and what
            `mm.data.store.catalog.finish_store` raises.
    """
    if len(present_shards(store) & set(range(plan.num_shards))) < plan.num_shards:
        return None
    bad: list[BadClip] = []
    for number in range(plan.num_shards):
        skipped = _skipped_as_planned(store, plan, number)
        if skipped is None:
            put_aside(store, number)
            return None
        if skipped:
            bad += read_bad_clips(shard_folder(store, number) / SKIPPED)
    if len(bad) > policy.allowed(plan.num_rows):
        raise_limited(too_many(len(bad), plan.num_rows, policy, bad))
    for extra in present_shards(store) - set(range(plan.num_shards)):
        put_aside(store, extra)
    write_skipped(store, bad)
    manifest = finish_store(store, plan.num_shards, plan.recipe, plan.draws)
    for name in () if live_claims(store) else (WORK, FORMER):
        shutil.rmtree(store / name, ignore_errors=True)
    finished = (store / MANIFEST).stat().st_mtime
    for path in [*(store / SHARDS).glob(f"{TEMPORARY_PREFIX}*"), *store.glob(f"{TEMPORARY_PREFIX}*")]:
        with contextlib.suppress(OSError):  # another worker may remove the same
            if path.parent == store and finished - path.stat().st_mtime < LEASE_S:
                continue  # of one that finishes the store, too
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return manifest


def remove_left_behind(store: Path, plan: Plan, run: int) -> None:
    """Remove what a killed worker wrote of a run that is now claimed by this process."""
    for shard in plan.shards_of(run):
        for path in (store / SHARDS).glob(f"{TEMPORARY_PREFIX}{shard:08d}-*"):
            shutil.rmtree(path, ignore_errors=True)


def live_name(token: str) -> str:
    """Name of the claim of a process of a training that keeps features in parts, by the word that it alone has."""
    return f"live-{token}"


def live_claims(store: Path) -> list[Claim]:
    """Claims of the trainings that keep features in parts of a store, as far as they live."""
    claims = [claim for claim in all_claims(store / WORK / CLAIMS) if claim.name.startswith(live_name(""))]
    newest = max((claim.touched for claim in claims), default=0.0)
    return [claim for claim in claims if not claim.is_stale(max(newest, time.time()))]


def held_by_others(store: Path) -> int:
    """Number of runs that other processes work on."""
    return sum(claim.name.isdigit() for claim in all_claims(store / WORK / CLAIMS))


def _skipped_as_planned(store: Path, plan: Plan, number: int) -> int | None:
    """Number of clips that a shard lacks; None for one that is not as planned."""
    if number >= plan.num_shards:
        return None
    folder = shard_folder(store, number)
    try:
        about = read_table_header(folder / INDEX, KIND, "").about
        if about.get("recipe") != plan.recipe or about.get("rows") != plan.made_from(number):
            return None
        check_body(folder / BODY, int(about["body_bytes"]))
        return int(about["skipped"])
    except DataError as error:
        if error.id in NO_DAMAGE:
            raise
        return None
    except (KeyError, TypeError, ValueError):
        return None
