"""SimpleTuner's entries as extractions, one store for each, and as shares of training.

What an entry asks for is said in the words of `data.clip` and `data.mixture`. What has no word here is refused, and
what is only written otherwise is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.data import SourceShare
from mm.config.run.extraction import SourceClip
from mm.data.files import raise_limited
from mm.data.sources.simpletuner_entries import SAMPLES, AspectBucket, Entry, VideoFields
from mm.errors import Problem


@dataclass(frozen=True)
class EntryRun:
    """Extraction and share of training of an entry.

    Attributes:
        id: the entry's. clip: that is taken of its files. share: of training, without the folder; None for none.
        notes: what is written otherwise.
    """

    id: str
    clip: SourceClip
    share: dict[str, Any] | None
    notes: tuple[str, ...]

    def share_of(self, store: Path) -> SourceShare | None:
        """The share of its store."""
        return None if self.share is None else SourceShare(folder=str(store), **self.share)


def entry_runs(file: Path, entries: Sequence[Entry], *, alignment: int, rounding: int) -> list[EntryRun]:
    """Runs of the entries of samples that are not switched off.

    Args:
        file: for messages. entries: that `mm.data.sources.simpletuner_rules.read_entries` accepts.
        alignment, rounding: SimpleTuner's `aspect_bucket_alignment` and `aspect_bucket_rounding`.

    Raises:
        DataError: DATA-171 for what an entry must say, DATA-172 for what has no word here; all of them at once.
    """
    used = [entry for entry in entries if entry.dataset_type in SAMPLES and not entry.is_off]
    problems = [
        Problem(id, f"{file} entry {entry.id}{found}", remedy)
        for entry in used
        for id, found, remedy in (*_unsaid(entry), *_without_a_word(entry))
    ]
    raise_limited(problems)
    return [EntryRun(e.id, _clip(e, alignment, rounding), _share(e), tuple(_notes(e))) for e in used]


_Fault = tuple[str, str, str]
_LONGEST_ID = 200  # bytes; file systems take names of 255, those of temporary files included


def _unsaid(entry: Entry) -> Iterator[_Fault]:
    if entry.id in (".", "..") or len(entry.id.encode()) > _LONGEST_ID:
        yield "DATA-171", " has an id that is no name of a folder, as its store's is.", "Give it a plain, short name."
    if entry.resolution is None:
        yield "DATA-171", " has no resolution.", "Add it, with resolution_type; SimpleTuner takes 1024 pixel_area."
    if entry.dataset_type == "image":
        return
    video = entry.video or VideoFields()
    if _most_frames(video) is None:
        remedy = "Add it; SimpleTuner takes five seconds, 75 frames of Wan."
        yield "DATA-171", " has no video.num_frames.", remedy
    elif video.num_frames is not None and (video.min_frames or 0) > video.num_frames:
        found = f" leaves out videos of fewer than {video.min_frames} frames, and takes {video.num_frames}."
        yield "DATA-172", found, "Lower video.min_frames to video.num_frames, and remove shorter files."


def _without_a_word(entry: Entry) -> Iterator[_Fault]:
    """DATA-172: what SimpleTuner does and extraction or training here do not."""
    if entry.crop_style == "face":
        remedy = "Take center, corner or random; or cut the pictures before, and set crop to false."
        yield "DATA-172", " has crop_style face, for which no detector of faces is here.", remedy
    if entry.is_regularisation_data:
        found = " is regularisation data: SimpleTuner holds its predictions to the base model's, and no loss here does."
        remedy = "Set is_regularisation_data to false, to train on it as on other data, or disable the entry."
        yield "DATA-172", found, remedy


def _clip(entry: Entry, alignment: int, rounding: int) -> SourceClip:
    shape: dict[str, Any] = {
        "rule": entry.resolution_type,
        "resolution": entry.resolution,
        "alignment": alignment,
        "rounding": rounding,
        "minimum_image_size": entry.minimum_image_size or None,
        "max_upscale_threshold": entry.max_upscale_threshold,
        "crop": entry.crop,
        "crop_style": entry.crop_style,
    }
    if entry.crop:
        shape |= {
            "maximum_image_size": entry.maximum_image_size,
            "target_downsample_size": entry.target_downsample_size,
            "crop_aspect": entry.crop_aspect,
            "crop_aspect_buckets": tuple(
                bucket.model_dump() if isinstance(bucket, AspectBucket) else bucket
                for bucket in entry.crop_aspect_buckets
            ),
        }
    aspects = ("minimum_aspect_ratio", "maximum_aspect_ratio")
    shape |= {name: getattr(entry, name) for name in aspects if getattr(entry, name) is not None}
    video = (entry.video or VideoFields()) if entry.dataset_type == "video" else VideoFields(num_frames=1)
    values: dict[str, Any] = {"shape": shape, "num_frames": _in_the_vae(_most_frames(video) or 1)}
    frames: dict[str, Any] = {"start": "first"}
    if video.max_frames is not None:
        frames["max_frames"] = video.max_frames
    if video.bucket_strategy == "resolution_frames" and video.num_frames is None:
        values["min_num_frames"] = _in_the_vae(max(video.min_frames or 1, TEMPORAL_STRIDE + 1))
        if video.frame_interval is not None:
            frames["length_multiple"] = video.frame_interval
    if entry.dataset_type == "video":
        values["frames"] = frames
    return SourceClip.model_validate(values)


def _share(entry: Entry) -> dict[str, Any] | None:
    if entry.probability == 0:
        return None
    return {
        "repeats": entry.repeats + 1,
        "weight": entry.probability,
        "micro_batch_size": entry.train_batch_size,
        "begin_step": entry.start_step,
        "end_step": entry.end_step or None,
        "begin_epoch": entry.start_epoch - 1,
        "end_epoch": entry.end_epoch or None,
    }


def _notes(entry: Entry) -> Iterator[str]:
    video = entry.video or VideoFields()
    if entry.probability == 0:
        yield "probability 0: it is extracted, and not trained on"
    if entry.maximum_image_size is not None and not entry.crop:
        yield "maximum_image_size and target_downsample_size have no effect without crop"
    if entry.crop_aspect_buckets and not entry.crop:
        yield "crop_aspect and crop_aspect_buckets have no effect without crop"
    if entry.conditions:
        yield f"the files of {', '.join(entry.conditions)} go with its own, for tasks that take them"
    if entry.dataset_type == "image":
        return
    most = _most_frames(video)
    if most is not None and _in_the_vae(most) != most:
        yield f"{_in_the_vae(most)} frames for {most}, since the VAE takes 4k + 1"
    if video.is_i2v:
        yield "is_i2v: the task of the extraction decides whether the first frame is given"
    if video.frame_interval is not None and video.num_frames is not None:
        yield "frame_interval has no effect beside num_frames"


def _most_frames(video: VideoFields) -> int | None:
    """The most frames of a clip, of any number."""
    if video.num_frames is None and video.bucket_strategy == "resolution_frames":
        return video.max_frames
    return video.num_frames


def _in_the_vae(frames: int) -> int:
    """The largest 4k + 1 that is not above a number of frames."""
    return (frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
