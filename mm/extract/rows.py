"""Rows of a plan as what is to be encoded: checked, their files looked at, their captions chosen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm.config.bad_samples import OnBadSample
from mm.config.data import TEMPORAL_STRIDE
from mm.config.run.extraction import SourceClip
from mm.config.tasks.registry import FEATURE_TASKS, FeatureTaskName
from mm.data.clips import check_announced_length
from mm.data.features import FEATURES, Origin, feature_name, text_hash, video_fingerprint
from mm.data.files import MAX_PROBLEMS_SHOWN, raise_limited
from mm.data.listing import FeatureRow, LatentShape
from mm.data.metadata import VideoSample
from mm.data.sources.checking import CheckedRow, RowReader
from mm.errors import DataError, Problem
from mm.extract.plan import Plan
from mm.extract.skipping import FAULTS_OF_A_VIDEO, BadClip


def rows_of(plan: Plan, run: int, reader: RowReader) -> list[CheckedRow]:
    """The rows of a run; raises DATA-150 for a plan that is damaged."""
    rows = []
    for row in plan.rows(run):
        listed = reader.row_of(row.source, row.text, row.line)
        rows.append(reader.check(row.source, row.number, listed, row.kind))
    return rows


def check_rows(rows: Iterable[CheckedRow], clip: SourceClip, policy: OnBadSample) -> None:
    """Refuse rows that are wrong, and where bad samples stop the work also those whose video is known to be bad.

    Raises:
        DataError: DATA-060 for all rows that cannot be read at all; else DATA-001, DATA-047, DATA-061 to DATA-064
            and DATA-245 to DATA-247 for rows; else DATA-004 and DATA-160 for videos that are too short or long by their
            own annotation.
    """
    unread, wrong, short = list[Problem](), list[Problem](), list[Problem]()
    skippable = FAULTS_OF_A_VIDEO if policy.skips else frozenset()
    for row in rows:
        unread += [problem for problem in row.problems if problem.id == "DATA-060"]
        wrong += [problem for problem in row.problems if problem.id not in skippable]
        if not policy.skips:
            short += _of_length(row, clip)
        if max(map(len, (unread, wrong, short))) > 100 * MAX_PROBLEMS_SHOWN:
            break  # enough to tell
    for problems in (unread, wrong, short):
        raise_limited(problems)


def look(row: CheckedRow, clip: SourceClip) -> str:
    """A word that changes when the file of a row or its captions do; of a clip known to be bad the error's id."""
    sample = usable(row, clip)
    if isinstance(sample, BadClip):
        return sample.error
    try:
        return f"{source_word(sample)} {text_hash(json.dumps(sample.captions))}"
    except DataError as error:
        return error.id


def usable(row: CheckedRow, clip: SourceClip) -> VideoSample | BadClip:
    """The sample of a row that `check_rows` let pass, or what is known to be wrong with its video."""
    if row.sample is None:
        raise ValueError("a row without a sample was let pass")
    problems = [*row.problems, *_of_length(row, clip)]
    return BadClip.of(row.sample.id, row.sample.where, problems[0]) if problems else row.sample


def source_word(sample: VideoSample, draw: int = 0, fingerprint: str | None = None) -> str:
    """Word for all that a draw's clip is made from: the video, its cut, the task's columns and media, and the draw.

    Args:
        sample, draw: whose. fingerprint: of the video; None looks at it.

    Raises:
        DataError: DATA-001 for a file that cannot be read.
    """
    cut = f"@{sample.annotation.cut_name}" if sample.annotation.cut else ""
    columns = "".join(f"#{name}={value!r}" for name, value in sample.columns.items())
    listed = ((role, file) for role, files in sorted(sample.roles.items()) for file in files)
    beside = "".join(f"+{role}={_fingerprint(sample, file)}" for role, file in listed)
    video = _fingerprint(sample, sample.file) if fingerprint is None else fingerprint
    return f"{video}{cut}{columns}{beside}{f'~{draw}' if draw else ''}"


def _fingerprint(sample: VideoSample, file: Path) -> str:
    """Sixteen hexadecimal digits of a file, or of the object that it is to be a copy of."""
    remote = sample.object_of(file)
    return video_fingerprint(file) if remote is None else remote.fingerprint


def origin_of(sample: VideoSample, draw: int, caption: str, recipe_key: str, fingerprint: str | None = None) -> Origin:
    """Source of a draw's features; takes and raises what `source_word` does."""
    return Origin(sample.id, recipe_key, text_hash(caption), source_word(sample, draw, fingerprint))


def listed_row(
    sample: VideoSample,
    origin_video: str,
    caption: str,
    latent_shape: LatentShape,
    *,
    start_frame: int,
    text_tokens: int,
    task: FeatureTaskName,
    taken: Mapping[str, Any] | None = None,
) -> FeatureRow:
    """Row of a store's list for a draw of a sample.

    Args:
        sample: whose. origin_video: `source_word` of the draw. caption: that was embedded, to so many `text_tokens`.
        latent_shape: (C, F, H, W), with the frames in front of the clip's. start_frame, taken: of the clip.
        task: of the store.
    """
    _, frames, height, width = latent_shape
    frames -= FEATURE_TASKS[task].images_in_front(sample.roles)
    num_frames, pixels = (frames - 1) * TEMPORAL_STRIDE + 1, FEATURE_TASKS[task].latent_pixels
    return FeatureRow(
        sample=sample.id,
        file=f"{FEATURES}/{feature_name(sample.id)}",
        path=sample.annotation.path,
        cap=caption,
        start_frame_idx=start_frame,
        sample_num_frames=num_frames,
        sample_size=f"{num_frames}x{height * pixels}x{width * pixels}",
        latent_shape=latent_shape,
        text_tokens=text_tokens,
        task=task,
        video=origin_video,
        taken=None if taken is None else dict(taken),
    )


def _of_length(row: CheckedRow, clip: SourceClip) -> tuple[Problem, ...]:
    try:
        if row.sample is not None:
            check_announced_length(row.sample, clip)
    except DataError as error:
        return error.problems
    return ()
