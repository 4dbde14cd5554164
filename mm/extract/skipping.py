"""Clips that are left out of a store because they cannot be read (`--on-bad-sample skip:max=0.1%`).

A shard says which clips it lacks (skipped.jsonl in its folder). While shards are being made, a file for each that lacks
some stands in STORE/work/skipped, with their number in its name, so that one listing counts those of all workers. Who
finishes the store puts the shards' records together, in the order of the rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mm.config.bad_samples import OnBadSample
from mm.data.files import MAX_PROBLEMS_SHOWN, make_folder, raise_limited, write_atomically
from mm.data.replacing import FAULTS_OF_A_CLIP
from mm.errors import DataError, Problem

SKIPPED = "skipped.jsonl"
SKIPS = "skipped"
FAULTS_OF_A_VIDEO = FAULTS_OF_A_CLIP | {"DATA-070", "DATA-071"}


@dataclass(frozen=True, slots=True)
class BadClip:
    """A clip that cannot be read: its sample's id, its video, the error's id, the reason and what to do."""

    sample: str
    file: str
    error: str
    reason: str
    remedy: str

    @classmethod
    def of(cls, sample: str, file: str, problem: Problem) -> BadClip:
        """Make one from the error that reading it gave."""
        return cls(sample, file, problem.id, problem.message, problem.remedy)

    def problem(self) -> Problem:
        """The error that reading it gave."""
        return Problem(self.error, self.reason, self.remedy)


def may_be_skipped(error: DataError) -> bool:
    """Recognise an error about one video, and not about the disk, the weights or what is installed."""
    return all(problem.id in FAULTS_OF_A_VIDEO for problem in error.problems)


class Skipping:
    """The bad clips of all workers, counted against what is allowed."""

    def __init__(self, policy: OnBadSample, num_rows: int, folder: Path) -> None:
        """
        Args:
            policy: what may be left out. num_rows: of the whole plan. folder: STORE/work/skipped.
        """
        self._policy, self._num_rows, self._folder = policy, num_rows, folder

    def add(self, run: int, bad: Sequence[BadClip]) -> None:
        """Note the bad clips of a run so far.

        Raises:
            DataError: the last one's own error where none may be skipped, DATA-073 when it is one too many, DATA-018
                and DATA-019 when it cannot be noted.
        """
        if not self._policy.skips:
            raise_limited([bad[-1].problem()])
        self.note(run, bad)
        total = sum(self.counts().values())
        if total > self._policy.allowed(self._num_rows):
            raise_limited(too_many(total, self._num_rows, self._policy, self._known()))

    def note(self, run: int, bad: Sequence[BadClip]) -> None:
        """Write the mark of a run that lacks clips, in place of another."""
        make_folder(self._folder, "the store's folder")
        content = "".join(json.dumps(asdict(clip)) + "\n" for clip in bad).encode()
        mark = self._folder / f"{run:08d}-{len(bad)}"
        write_atomically(mark, [content], len(content))
        self.forget(run, but=mark)

    def forget(self, run: int, but: Path | None = None) -> None:
        """Remove the marks of a run."""
        for path in self._folder.glob(f"{run:08d}-*"):
            if path != but:
                path.unlink(missing_ok=True)

    def counts(self) -> dict[int, int]:
        """Number of clips left out, by run."""
        return skip_counts(self._folder)

    def _known(self) -> list[BadClip]:
        """The first of all clips that are left out."""
        found: list[BadClip] = []
        for run, count in sorted(self.counts().items()):
            path = self._folder / f"{run:08d}-{count}"
            if len(found) <= MAX_PROBLEMS_SHOWN and path.exists():
                found += read_bad_clips(path)
        return found


def skip_counts(folder: Path) -> dict[int, int]:
    """Number of clips left out, by run, from the names of marks."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found: dict[int, int] = {}
    for name in names:
        run, _, count = name.partition("-")
        if run.isdigit():
            found[int(run)] = max(found.get(int(run), 0), int(count))
    return found


def too_many(total: int, num_rows: int, policy: OnBadSample, clips: Sequence[BadClip]) -> list[Problem]:
    """DATA-073 with the counts, followed by the errors of the clips."""
    message = f"{total} of {num_rows} clips cannot be read; {policy} allows {policy.allowed(num_rows)}."
    remedy = "Replace them or remove their rows; mm doctor data finds all and writes a list without them."
    return [Problem("DATA-073", message, remedy), *(clip.problem() for clip in clips)]


def read_bad_clips(path: Path) -> list[BadClip]:
    """The records of a shard or a mark."""
    return [BadClip(**json.loads(line)) for line in path.read_text().splitlines()]


def write_skipped(store: Path, clips: Sequence[BadClip]) -> None:
    """Write skipped.jsonl, one row a clip; none, no file. Raises what `write_atomically` raises."""
    names = ("sample", "file", "error", "reason")
    lines = [(json.dumps({name: getattr(clip, name) for name in names}) + "\n").encode() for clip in clips]
    if lines:
        write_atomically(store / SKIPPED, lines, sum(map(len, lines)))
    else:
        (store / SKIPPED).unlink(missing_ok=True)


def num_skipped(store: Path) -> int:
    """Number of clips that a finished store leaves out."""
    path = store / SKIPPED
    return len(path.read_bytes().splitlines()) if path.exists() else 0
