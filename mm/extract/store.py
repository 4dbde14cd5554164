"""Plan of an extraction, and the store that it prepares and, when every sample is on disk, commits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm.config.bad_samples import OnBadSample
from mm.config.data import LATENT_PIXELS, TEMPORAL_STRIDE
from mm.config.run.extraction import SourceClip
from mm.config.run.origins import Origins
from mm.data.clips import check_announced_length
from mm.data.features import (
    EMPTY_PROMPT,
    FEATURES,
    LISTING,
    Origin,
    feature_name,
    is_complete,
    read_header,
    text_hash,
    video_fingerprint,
)
from mm.data.files import make_folder, raise_limited, read_rows, remove_temporaries
from mm.data.listing import FeatureRow, write_listing
from mm.data.metadata import VideoSample
from mm.data.recipe import RECIPE_FILE, Recipe, check_recipe, load_recipe, save_recipe
from mm.data.sources.checking import CheckedRow
from mm.data.store.catalog import holds_shards
from mm.errors import DataError, Problem
from mm.extract.skipping import (
    FAULTS_OF_A_VIDEO,
    BadClip,
    check_skipped,
    forget,
    forget_records,
    recorded,
    write_skipped,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractionTask:
    """One sample of the plan: its video, the caption chosen for it, its file and what that is made from."""

    sample: VideoSample
    caption: str
    file: Path
    origin: Origin

    @property
    def id(self) -> str:
        """The sample's."""
        return self.sample.id


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A sample of which is known before it is read that it cannot be."""

    clip: BadClip

    @property
    def id(self) -> str:
        """The sample's."""
        return self.clip.sample


def check_plan(rows: Sequence[CheckedRow], preprocess: SourceClip, policy: OnBadSample) -> None:
    """Refuse rows that are wrong, and where bad samples stop the work also those whose video is known to be bad.

    Raises:
        DataError: DATA-001 and DATA-061 to DATA-064 for rows, DATA-004 for videos that are too short by their own
            annotation; all at once.
    """
    skippable = FAULTS_OF_A_VIDEO if policy.skips else frozenset()
    problems = [problem for row in rows for problem in row.problems if problem.id not in skippable]
    raise_limited(problems)
    if not policy.skips:
        raise_limited([problem for row in rows for problem in _too_short(row, preprocess)])


def plan(
    row: CheckedRow, store: Path, preprocess: SourceClip, recipe: Recipe, seed: int
) -> ExtractionTask | Unreadable:
    """Task for one row that `check_plan` let pass."""
    sample = row.sample
    if sample is None:
        raise ValueError("a row without a sample was let pass")
    problems = [*row.problems, *_too_short(row, preprocess)]
    if not problems:
        caption = sample.caption(seed)
        try:
            cut = f"@{sample.annotation.cut_name}" if sample.annotation.cut else ""
            columns = "".join(f"#{name}={value!r}" for name, value in sample.columns.items())
            video = f"{video_fingerprint(sample.file)}{cut}{columns}"
            origin = Origin(sample.id, recipe.key, text_hash(caption), video)
            return ExtractionTask(sample, caption, store / FEATURES / feature_name(sample.id), origin)
        except DataError as error:
            problems += error.problems
    return Unreadable(BadClip.of(sample.id, sample.file, problems[0]))


def check_store(store: Path, recipe: Recipe, overwrite: bool, words: Origins) -> None:
    """Refuse a store of another recipe or of shards. Every process looks, so that all stop with the same error."""
    place = words["output.path"].name
    if holds_shards(store):
        message = f"{store} is a store of shards, and extraction writes files."
        raise DataError("DATA-068", message, f"Give another {place}; mm migrate shards takes it over when it is done.")
    if (store / RECIPE_FILE).exists() and not overwrite:
        anew = words["output.overwrite"].with_value(True)
        remedy = f"Give another {place}, the values and weights it was made with, or {anew} to make it anew."
        check_recipe(store, load_recipe(store), recipe.model_dump(), remedy)


def prepare(
    store: Path, recipe: Recipe, items: Sequence[ExtractionTask | Unreadable], empty: Origin, words: Origins
) -> None:
    """Make the store ready to write to: its folder, its recipe, no leftovers, and no list unless it still holds."""
    features = store / FEATURES
    make_folder(features, words["output.path"].place())
    for folder in (store, features):
        remove_temporaries(folder)
    listing = store / LISTING
    if listing.exists():
        listed, wanted = _listed(listing), [f"{FEATURES}/{feature_name(item.id)}" for item in items]
        if left_out := set(listed) - set(wanted):
            message = "%s is made anew without %d of its %d samples, which are no longer annotated"
            log.warning(message, listing, len(left_out), len(listed))
        if listed != wanted or _incomplete(store, items, empty):
            listing.unlink()
    forget(store)
    if not (listing.exists() and (store / RECIPE_FILE).exists()):
        save_recipe(store, recipe)


def commit(
    store: Path, items: Sequence[ExtractionTask | Unreadable], empty: Origin, recipe: Recipe, policy: OnBadSample
) -> None:
    """List all samples, having seen every one of them whole on disk or recorded as bad; a list that is there holds.

    Raises:
        DataError: DATA-011 for what is missing, DATA-073 when more clips are bad than the policy allows.
    """
    if (store / LISTING).exists():
        return
    remedy = "Start the extraction again with all its processes; what is complete is kept."
    bad = {item.id: clip for item in items if (clip := recorded(store, item.id)) is not None}
    missing = _incomplete(store, [item for item in items if item.id not in bad], empty)
    raise_limited([Problem("DATA-011", f"{file} is missing or incomplete.", remedy) for file in missing])
    check_skipped(list(bad.values()), len(items), policy)
    write_skipped(store, list(bad.values()))
    write_listing(
        store, [_row(item, recipe) for item in items if isinstance(item, ExtractionTask) and item.id not in bad]
    )
    forget_records(store)


def _too_short(row: CheckedRow, preprocess: SourceClip) -> tuple[Problem, ...]:
    try:
        if row.sample is not None:
            check_announced_length(row.sample, preprocess)
    except DataError as error:
        return error.problems
    return ()


def _listed(listing: Path) -> list[str]:
    """The files that data.jsonl names; none where it cannot be read."""
    try:
        return [str(row.get("file")) for row in read_rows(listing, "DATA-010")]
    except (DataError, AttributeError):
        return []


def _incomplete(store: Path, items: Sequence[ExtractionTask | Unreadable], empty: Origin) -> list[Path]:
    """Files of the store that are missing, cut off, or made from something else."""
    found = [
        store / FEATURES / feature_name(item.id)
        for item in items
        if isinstance(item, Unreadable) or not is_complete(item.file, item.origin)
    ]
    empty_file = store / FEATURES / EMPTY_PROMPT
    return found if is_complete(empty_file, empty) else [*found, empty_file]


def _row(task: ExtractionTask, recipe: Recipe) -> FeatureRow:
    header = read_header(task.file)
    shape = header.tensors["latents"][1]
    num_frames = (shape[1] - 1) * TEMPORAL_STRIDE + 1
    return FeatureRow(
        sample=task.sample.id,
        file=f"{FEATURES}/{task.file.name}",
        path=task.sample.annotation.path,
        cap=task.caption,
        start_frame_idx=header.start_frame,
        sample_num_frames=num_frames,
        sample_size=f"{num_frames}x{shape[2] * LATENT_PIXELS}x{shape[3] * LATENT_PIXELS}",
        latent_shape=(shape[0], shape[1], shape[2], shape[3]),
        text_tokens=header.tensors["prompt"][1][0],
        task=recipe.task,
        video=header.origin.video,
        taken=None if header.taken is None else dict(header.taken),
    )
