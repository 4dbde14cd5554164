"""All rules of an extraction."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.data import TEMPORAL_STRIDE, default_folder
from mm.config.rules.encoders import tile_problems
from mm.config.rules.shapes import fewest_of_rule, frame_problems
from mm.config.rules.sources import TABLES, clip_problems, list_problems
from mm.config.run.extraction import ExtractionRun
from mm.config.tasks.registry import DEFAULT, FEATURE_TASKS, named
from mm.config.tasks.task import Source
from mm.config.unread import broken
from mm.errors import ConfigError, Problem, raise_all


def check_extraction(run: ExtractionRun) -> None:
    """Check an extraction before any device is touched.

    Raises:
        ConfigError: with what could not be read and every violated rule.
    """
    raise_all(ConfigError, [*run.problems, *broken(EXTRACTION_RULES, run)])


def _clips_can_be(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-050, CFG-051, CFG-210 and CFG-211."""
    yield from clip_problems(run.data.clip, run.origins, "data.clip", run.task)


def _frames_can_be_taken(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-212."""
    yield from frame_problems(run.data.clip, run.origins, "data.clip")


def _short_videos_give_a_clip(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-052: a short video's clip is no longer than a long one's."""
    clip, least, most = run.data.clip, *(run.origins[f"data.clip.{name}"] for name in ("min_num_frames", "num_frames"))
    if clip.min_num_frames is not None and clip.min_num_frames > clip.num_frames:
        yield Problem(
            "CFG-052",
            f"{least.file}: {least.name} is {clip.min_num_frames}, more than {most.name} {clip.num_frames}.",
            f"Use at most {most.name}, or remove it to refuse every shorter video.",
        )


def _videos_are_listed(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-053."""
    data = run.data
    needs_folder = default_folder(data.path, data.format) is None
    yield from list_problems(data.path, data.folder, run.origins, "data", endings=TABLES, needs_folder=needs_folder)


def _columns_of_files_are_of_a_table(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-170: one format alone lets columns be named, and one an entry."""
    said = run.origins["data.format"]
    for keys, given in ((run.origins[f"data.{name}"], getattr(run.data, name)) for name in ("file_keys", "left_out")):
        if given and run.data.format != "diffsynth":
            found = f"{keys.file}: {keys.name} has no effect where {said.name} is not diffsynth."
            yield Problem("CFG-170", found, f"Set {said.name} to diffsynth, or remove it.")
    entry = run.origins["data.entry"]
    if run.data.entry is not None and run.data.format != "simpletuner":
        found = f"{entry.file}: {entry.name} has no effect where {said.name} is not simpletuner."
        yield Problem("CFG-170", found, f"Set {said.name} to simpletuner, or remove it.")


def _tiles_cover_the_frame(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-055."""
    yield from tile_problems(run.encoders.vae, run.origins)


def _images_have_their_encoder(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-074: tasks with features of an image encoder have one, and only they."""
    words, task, given = run.origins, run.task, run.encoders.image is not None
    image, said = words["encoders.image"], words["extraction.task"]
    seen = task.made_by(Source.IMAGE_ENCODER)
    if seen and not given:
        folder = words["encoders.image.from_pretrained"]
        yield Problem(
            "CFG-074",
            f"The task is {task.name}, and {image.file} has no {image.name}.",
            f"Add {folder.key or folder.name}, the folder image_encoder of an I2V or FLF2V model; or set {said.name} "
            f"to {DEFAULT.name}.",
        )
    if given and not seen:
        others = named(other for other in FEATURE_TASKS.values() if other.made_by(Source.IMAGE_ENCODER))
        yield Problem(
            "CFG-074",
            f"{image.place()} has no effect with the task {task.name}.",
            f"Remove it, or set {said.name} to {others} wherever it is said.",
        )


def _frames_have_others_behind_them(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-075: a clip of one frame is its own first frame."""
    clip, words = run.data.clip, run.origins
    for name, frames in (("num_frames", clip.num_frames), ("min_num_frames", clip.min_num_frames)):
        if run.task.fewest_latent_frames > 1 and frames is not None and frames <= TEMPORAL_STRIDE:
            yield Problem(
                "CFG-075",
                f"{words[f'data.clip.{name}'].name} is {frames}: a clip of one frame is its own first frame, and "
                f"{run.task.name} has nothing to learn.",
                f"Use at least {TEMPORAL_STRIDE + 1}.",
            )
    if run.task.fewest_latent_frames > 1 and fewest_of_rule(clip) <= TEMPORAL_STRIDE < clip.num_frames:
        yield Problem(
            "CFG-075",
            f"{words['data.clip.shape'].name} gives some clips one frame, which is their own first: {run.task.name} "
            "has nothing to learn from them.",
            "Lower max_side, or raise num_frames or token_side.",
        )


def _bad_samples_are_said(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-110: what becomes of clips that cannot be read."""
    try:
        parse_on_bad_sample(run.data.on_bad_sample, run.origins["data.on_bad_sample"].name)
    except ConfigError as error:
        yield from error.problems


def _part_can_be(run: ExtractionRun) -> Iterator[Problem]:
    """CFG-225: the part of the shards that this process makes."""
    try:
        _ = run.extraction.share
    except ValueError as error:
        found = f"{run.word('extraction.shard_of')} is {run.extraction.shard_of!r}: it {error}."
        remedy = (
            "Give for example 37/200; in a Slurm array of 1-200 that is $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX."
        )
        yield Problem("CFG-225", found, remedy)


EXTRACTION_RULES: tuple[Callable[[ExtractionRun], Iterator[Problem]], ...] = (
    _clips_can_be,
    _short_videos_give_a_clip,
    _frames_can_be_taken,
    _videos_are_listed,
    _columns_of_files_are_of_a_table,
    _tiles_cover_the_frame,
    _bad_samples_are_said,
    _part_can_be,
    _images_have_their_encoder,
    _frames_have_others_behind_them,
)
