"""Clips that are left out of a store because they cannot be read (`--on-bad-sample skip:max=0.1%`).

Every process writes a record for each of its own bad clips, below the store. When all are done the first process turns
the records into skipped.jsonl and leaves those clips out of data.jsonl. Every start reads bad clips again: what is left
out depends on the videos alone, however many processes there are and however often they are started, and a video that
was replaced is taken in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mm.config.bad_samples import OnBadSample
from mm.data.features import FEATURES, feature_name
from mm.data.files import raise_limited, write_atomically
from mm.errors import DataError, Problem

SKIPPED = "skipped.jsonl"
FAULTS_OF_A_VIDEO = frozenset(
    {
        *("DATA-001", "DATA-002", "DATA-003", "DATA-004", "DATA-005", "DATA-006"),
        *("DATA-070", "DATA-071", "DATA-096", "DATA-097", "DATA-098", "DATA-099"),
        *("DATA-086", "DATA-110", "DATA-175"),
        *("DATA-160", "DATA-161", "DATA-162"),
    }
)

_RECORD = ".bad.json"


@dataclass(frozen=True, slots=True)
class BadClip:
    """A clip that cannot be read: its sample's id, its video, the error's id, the reason and what to do."""

    sample: str
    file: str
    error: str
    reason: str
    remedy: str

    @classmethod
    def of(cls, sample: str, file: Path, problem: Problem) -> BadClip:
        """Make one from the error that reading it gave."""
        return cls(sample, str(file), problem.id, problem.message, problem.remedy)

    def problem(self) -> Problem:
        """The error that reading it gave."""
        return Problem(self.error, self.reason, self.remedy)


def may_be_skipped(error: DataError) -> bool:
    """Recognise an error about one video, and not about the disk, the weights or what is installed."""
    return all(problem.id in FAULTS_OF_A_VIDEO for problem in error.problems)


class Skipping:
    """The bad clips of one process, counted against what is allowed of all."""

    def __init__(self, policy: OnBadSample, num_samples: int, store: Path) -> None:
        self._policy = policy
        self._num_samples = num_samples
        self._store = store
        self._found: list[BadClip] = []

    @property
    def count(self) -> int:
        """Clips that this process left out."""
        return len(self._found)

    def add(self, clip: BadClip) -> None:
        """Record a bad clip.

        Raises:
            DataError: its own error where none may be skipped, DATA-073 when it is one too many.
        """
        if not self._policy.skips:
            raise_limited([clip.problem()])
        self._found.append(clip)
        check_skipped(self._found, self._num_samples, self._policy)
        content = json.dumps(asdict(clip)).encode()
        write_atomically(_record(self._store, clip.sample), [content], len(content))


def check_skipped(clips: Sequence[BadClip], num_samples: int, policy: OnBadSample) -> None:
    """Stop where more clips are bad than the policy allows.

    Raises:
        DataError: DATA-073 with the counts, followed by the errors of the clips.
    """
    allowed = policy.allowed(num_samples)
    if len(clips) > allowed:
        message = f"{len(clips)} of {num_samples} clips cannot be read; {policy} allows {allowed}."
        remedy = "Replace them or remove their rows; mm doctor data finds all and writes a list without them."
        raise_limited([Problem("DATA-073", message, remedy), *(clip.problem() for clip in clips)])


def forget(store: Path) -> None:
    """Remove what an earlier extraction said of bad clips."""
    (store / SKIPPED).unlink(missing_ok=True)
    forget_records(store)


def forget_records(store: Path) -> None:
    """Remove the records of bad clips, which skipped.jsonl now has."""
    for path in (store / FEATURES).glob(f"*{_RECORD}"):
        path.unlink()


def recorded(store: Path, sample: str) -> BadClip | None:
    """Record that some process made of a sample."""
    path = _record(store, sample)
    return BadClip(**json.loads(path.read_text())) if path.exists() else None


def write_skipped(store: Path, clips: Sequence[BadClip]) -> None:
    """Write skipped.jsonl, one row a clip; none, no file. Raises what `write_atomically` raises."""
    names = ("sample", "file", "error", "reason")
    lines = [(json.dumps({name: getattr(clip, name) for name in names}) + "\n").encode() for clip in clips]
    if lines:
        write_atomically(store / SKIPPED, lines, sum(map(len, lines)))


def num_skipped(store: Path) -> int:
    """Number of clips that a finished store leaves out."""
    path = store / SKIPPED
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _record(store: Path, sample: str) -> Path:
    return (store / FEATURES / feature_name(sample)).with_suffix(_RECORD)
