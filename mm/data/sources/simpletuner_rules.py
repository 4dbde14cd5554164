"""SimpleTuner's multidatabackend.json, read and checked: every field, and every link between entries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm.config.base import parse
from mm.data.files import raise_limited, read_rows
from mm.data.sources.simpletuner_entries import SAMPLES, STORES, AspectBucket, Entry, VideoFields
from mm.errors import ConfigError, Problem

_DISABLE = 'Set "disabled": true in it, or remove it.'


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file, those that are switched off too.

    Raises:
        DataError: DATA-060 for a file that cannot be read; DATA-171 for a field that is unknown or wrong, and for
            entries that contradict themselves or each other; DATA-172 for what is not read here; all of them at once.
    """
    entries, problems = list[Entry](), list[Problem]()
    for number, values in enumerate(read_rows(path, "DATA-060"), start=1):
        name = values.get("id") if isinstance(values, dict) else None
        place = f"{path} entry {number}" + (f" ({name})" if isinstance(name, str) else "")
        try:
            entry = parse(Entry, values, place)
        except ConfigError as error:
            problems += (Problem("DATA-171", problem.message, problem.remedy) for problem in error.problems)
            continue
        entries.append(entry)
        if not entry.is_off:
            problems += [Problem(id, f"{place}{found}", remedy) for id, found, remedy in _faults(entry)]
    if not problems:
        problems += [Problem("DATA-171", f"{path}: {found}", remedy) for found, remedy in _links(entries)]
    raise_limited(problems)
    return entries


_Fault = tuple[str, str, str]


def _faults(entry: Entry) -> Iterator[_Fault]:
    """Error id, what an entry says behind its name, and what to do."""
    yield from _not_read(entry)
    if entry.dataset_type not in (*SAMPLES, "conditioning"):
        return
    if entry.type == "local" and entry.instance_data_dir is None:
        yield "DATA-171", " lacks instance_data_dir.", "Add it, the folder of its files."
    if (entry.maximum_image_size is None) != (entry.target_downsample_size is None):
        found = " has one of maximum_image_size and target_downsample_size alone."
        yield "DATA-171", found, "Give both, or neither."
    video = entry.video or VideoFields()
    if entry.video is not None and entry.dataset_type == "image":
        yield "DATA-171", " has video and is of the dataset_type image.", "Remove one of the two."
    if video.min_frames is not None and video.min_frames < (video.num_frames or 1):
        found = f" has min_frames {video.min_frames}, fewer than num_frames {video.num_frames}."
        yield "DATA-171", found, "Raise min_frames to num_frames at least."
    if video.max_frames is not None and video.max_frames < (video.min_frames or video.num_frames or 1):
        yield "DATA-171", f" has max_frames {video.max_frames}, fewer than it needs.", "Raise max_frames."
    if video.frame_interval is not None and video.bucket_strategy != "resolution_frames":
        remedy = "Set video.bucket_strategy to resolution_frames, or remove it."
        yield "DATA-171", " has a frame_interval, of which aspect_ratio buckets have no use.", remedy
    if entry.crop_aspect in ("closest", "random") and not entry.crop_aspect_buckets:
        yield "DATA-171", f" has crop_aspect {entry.crop_aspect} and no crop_aspect_buckets.", "Add them."
    if entry.end_step and entry.end_step <= entry.start_step:
        found = f" ends with step {entry.end_step} and begins after step {entry.start_step}."
        yield "DATA-171", found, "Raise end_step, or remove it."
    if entry.end_epoch and entry.end_epoch < entry.start_epoch:
        found = f" ends with epoch {entry.end_epoch} and begins with epoch {entry.start_epoch}."
        yield "DATA-171", found, "Raise end_epoch, or remove it."
    yield from _bucket_faults(entry)
    yield from _caption_faults(entry)


def _bucket_faults(entry: Entry) -> Iterator[_Fault]:
    weights = [bucket.weight for bucket in entry.crop_aspect_buckets if isinstance(bucket, AspectBucket)]
    if weights and (len(weights) < len(entry.crop_aspect_buckets) or abs(sum(weights) - 1) > 1e-6):
        found = f" has crop_aspect_buckets whose weights add up to {sum(weights):g}."
        yield "DATA-171", found, "Give each a weight, 1 in all; or none, for equal ones."
    if any(not isinstance(bucket, AspectBucket) and bucket <= 0 for bucket in entry.crop_aspect_buckets):
        yield "DATA-171", " has a crop_aspect_bucket that is not above 0.", "Give width by height."


def _caption_faults(entry: Entry) -> Iterator[_Fault]:
    if entry.dataset_type not in SAMPLES:
        return
    needs_prompt = entry.caption_strategy == "instanceprompt" or entry.only_instance_prompt
    if (needs_prompt or entry.prepend_instance_prompt) and entry.instance_prompt is None:
        yield "DATA-171", " needs an instance_prompt, and has none.", "Add it."
    if entry.caption_strategy == "parquet" and entry.parquet is None:
        yield "DATA-171", " has the caption_strategy parquet, and no field parquet.", "Add it, with path."


def _not_read(entry: Entry) -> Iterator[_Fault]:
    """DATA-172: what SimpleTuner reads and this program does not."""
    if entry.type == "aws" and entry.aws_bucket_name is None:
        yield "DATA-171", " is of the type aws and lacks aws_bucket_name.", "Add it."
    if entry.type == "aws" and (entry.aws_access_key_id or entry.aws_secret_access_key):
        remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and remove them."
        yield "DATA-172", " holds credentials, which are taken from where no file of a run shows them.", remedy
    if entry.type not in ("local", "aws"):
        found = f" is of the type {entry.type}; files are read from local folders and S3."
        yield "DATA-172", found, f"Copy it into a folder and set its type to local. {_DISABLE}"
    if entry.dataset_type in ("audio", "caption", "eval"):
        yield "DATA-172", f" is of the dataset_type {entry.dataset_type}, which is not read here.", _DISABLE
    for name in ("caption_filter_list", "caption_shuffle"):
        if getattr(entry, name) is not None:
            yield "DATA-172", f" has {name}; captions are taken as they are.", "Remove it, and change the captions."
    if entry.caption_strategy in ("huggingface", "webshart"):
        remedy = "Use textfile, filename, instanceprompt or parquet."
        yield "DATA-172", f" has the caption_strategy {entry.caption_strategy}.", remedy


def _links(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """Sayings of entries about each other that do not hold, and what to do."""
    for name, count in Counter(entry.id for entry in entries).items():
        if count > 1:
            yield f"{count} entries have the id {name}.", "Give each an id of its own."
    used = [entry for entry in entries if not entry.is_off]
    caches = Counter(entry.cache_dir_vae for entry in used if entry.cache_dir_vae is not None)
    for cache, count in caches.items():
        if count > 1:
            yield f"{count} entries have the cache_dir_vae {cache}.", "Give each a folder of its own."
    kinds = {entry.id: entry.dataset_type for entry in used}
    for entry in used:
        links = [(name, getattr(entry, name), name) for name in STORES]
        links += [("conditioning_data", other, "conditioning") for other in entry.conditions]
        for field, other, kind in links:
            if other is not None and kinds.get(other) != kind:
                there = f"is of the dataset_type {kinds[other]}" if other in kinds else "is not there"
                found = f"{field} of {entry.id} names {other}, which {there}."
                yield found, f"Name an entry of the dataset_type {kind}, or remove it."
        if entry.source_dataset_id is not None and kinds.get(entry.source_dataset_id) not in SAMPLES:
            found = f"source_dataset_id of {entry.id} names {entry.source_dataset_id}, which is no entry of samples."
            yield found, "Name the entry whose files it goes with."
    texts = [entry for entry in used if entry.dataset_type == "text_embeds"]
    defaults = [entry.id for entry in texts if entry.default]
    if texts and len(defaults) != 1:
        found = f"{len(defaults)} of {len(texts)} text_embeds entries have default: true."
        yield found, "Mark exactly one."
    if not any(kind in SAMPLES for kind in kinds.values()):
        yield "no entry is a source of samples.", "Give at least one of the dataset_type image or video."
