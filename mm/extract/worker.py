"""A worker: claims runs of rows that nobody has, makes their shards, and ends when there are none left to claim."""

from __future__ import annotations

import json
import logging
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm.config.bad_samples import parse_on_bad_sample
from mm.config.run.extraction import ExtractionRun
from mm.data.clips import Clip, read_clips
from mm.data.files import make_folder, write_atomically
from mm.data.metadata import VideoSample
from mm.data.sources.checking import RowReader
from mm.data.store.shard import shard_folder
from mm.errors import DataError, DataWriteError
from mm.extract.claims import Claims
from mm.extract.former import Former
from mm.extract.plan import Plan
from mm.extract.rows import check_rows, origin_of, rows_of, usable
from mm.extract.shard import DrawTask, RunTask, ShardMaker
from mm.extract.skipping import BadClip, Skipping
from mm.extract.store import WORK, present_shards, remove_left_behind, runs_done

FAILED = "failed"

log = logging.getLogger(__name__)


@dataclass
class Tally:
    """Numbers of a worker: samples encoded, copied and left out, clips by the library that read them, runs made."""

    encoded: int = 0
    copied: int = 0
    skipped: int = 0
    runs: int = 0
    readers: Counter[str] = field(default_factory=Counter)


class Runs:
    """The runs of rows that a worker may make, each claimed when it is asked for."""

    def __init__(self, store: Path, plan: Plan, claims: Claims, share: tuple[int, int], first: int) -> None:
        """
        Args:
            store: its folder. plan: its rows. claims: of this process.
            share: (i, n): every n-th run from number i on. first: run to begin with, where others begin elsewhere.
        """
        self._store, self._plan, self._claims = store, plan, claims
        mine = range(share[0], plan.num_runs, share[1])
        begin = next((place for place, run in enumerate(mine) if run >= first), 0)
        self._order = [*mine[begin:], *mine[:begin]]

    def __iter__(self) -> Iterator[int]:
        """Claim runs until there is none that is not done or in the hands of a living worker."""
        found = True
        while found:
            found = False
            done = runs_done(self._store, self._plan)
            for run in self._order:
                if run in done or not self._claims.take(claim_name(run)):
                    continue
                if all(shard_folder(self._store, shard).exists() for shard in self._plan.shards_of(run)):  # since then
                    self._claims.give_back(claim_name(run))
                    continue
                found = True
                yield run


def claim_name(run: int) -> str:
    """Name of the claim on a run."""
    return f"{run:08d}"


class Worker:
    """Makes what can be claimed of a store."""

    def __init__(
        self, run: ExtractionRun, store: Path, plan: Plan, reader: RowReader, maker: ShardMaker, skipping: Skipping
    ) -> None:
        """
        Args:
            run: the extraction. store: its folder. plan: its rows. reader: of rows. maker: of shards.
            skipping: what may be left out.
        """
        self._run, self._store, self._plan, self._reader = run, store, plan, reader
        self._maker, self._skipping = maker, skipping
        self._policy = parse_on_bad_sample(run.data.on_bad_sample, run.origins["data.on_bad_sample"].name)
        done = runs_done(store, plan)
        self._former = Former(store, (n for n in sorted(present_shards(store)) if n % plan.num_runs not in done))
        self._claimed: deque[RunTask] = deque()
        self.tally = Tally()

    def work(self, runs: Runs, claims: Claims, bar: Any) -> None:
        """Make all runs that can be claimed; what was done is in `tally`.

        Args:
            runs: to claim. claims: of this process. bar: a progress bar over the rows of all workers.

        Raises:
            DataError: what `ShardMaker.make` and reading rows raise; the shard is then noted as failed.
        """
        while self._round(runs, claims, bar):
            pass

    def _round(self, runs: Runs, claims: Claims, bar: Any) -> bool:
        """Make what can be claimed now; readers stay as long. Tells whether anything was."""
        before = self.tally.runs
        clips = read_clips(
            self._jobs(iter(runs), claims),
            self._run.data.clip,
            self._run.extraction.seed,
            num_workers=self._run.data.workers,
            time_limit=self._run.data.read_timeout,
            media=self._run.task.media,
        )
        with closing(clips):
            ahead = _Ahead(clips, self.tally.readers)
            while ahead.fill() or self._claimed:
                task = self._claimed[0]
                try:
                    self._make(task, ahead, claims, bar)
                except BaseException as error:
                    for left in self._claimed:
                        self._skipping.forget(left.run)
                    if isinstance(error, DataError):
                        _note_failure(self._store, task.run, error, claims)
                    raise
                self._claimed.popleft()
        return self.tally.runs > before

    def _jobs(self, runs: Iterator[int], claims: Claims) -> Iterator[tuple[VideoSample, int]]:
        """The clips of runs, each run claimed when a reader wants its first clip."""
        for run in runs:
            remove_left_behind(self._store, self._plan, run)
            self._skipping.forget(run)
            try:
                task = self._task(run)
            except DataError as error:
                _note_failure(self._store, run, error, claims)
                raise
            self._claimed.append(task)
            yield from task.to_read()

    def _task(self, run: int) -> RunTask:
        """The samples of a run's rows.

        Raises:
            DataError: what `mm.extract.rows.check_rows` raises, and DATA-150 for a plan that is damaged.
        """
        clip, rows = self._run.data.clip, rows_of(self._plan, run, self._reader)
        check_rows(rows, clip, self._policy)
        return RunTask(run, [self._draws(usable(row, clip)) for row in rows])

    def _draws(self, sample: VideoSample | BadClip) -> list[DrawTask] | BadClip:
        if isinstance(sample, BadClip):
            return sample
        tasks = []
        try:
            for draw in range(self._plan.draws):
                caption = sample.caption(self._run.extraction.seed, draw)
                origin = origin_of(sample, draw, caption, self._plan.recipe)
                tasks.append(DrawTask(sample, draw, caption, origin, self._former.find(origin)))
        except DataError as error:
            return BadClip.of(sample.id, sample.where, error.problems[0])
        return tasks

    def _make(self, task: RunTask, ahead: _Ahead, claims: Claims, bar: Any) -> None:
        tally, name = self.tally, claim_name(task.run)
        wanted = ahead.given + sum(1 for _ in task.to_read())
        try:
            made = self._maker.make(task, ahead, self._skipping, bar.update)
            tally.encoded += made.encoded
            tally.copied += made.copied
            tally.skipped += made.skipped
        except DataWriteError:
            if not claims.is_lost(name):
                raise
            log.warning("shard %s was taken over by another process, which makes it", name)
            while ahead.given < wanted:
                next(ahead)
        tally.runs += 1
        (self._store / WORK / FAILED / name).unlink(missing_ok=True)
        claims.give_back(name)


class _Ahead:
    """Clips in order, of which one is read before it is asked for: so runs are claimed before their turn comes."""

    def __init__(self, clips: Iterator[Clip | DataError], readers: Counter[str]) -> None:
        self._clips, self._readers = clips, readers
        self._next: Clip | DataError | None = None
        self.given = 0

    def fill(self) -> bool:
        """Wait for the next clip, if there is one."""
        if self._next is None:
            self._next = next(self._clips, None)
        return self._next is not None

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Clip | DataError:
        if not self.fill() or self._next is None:
            raise StopIteration
        clip, self._next = self._next, None
        self.given += 1
        if isinstance(clip, Clip):
            self._readers[clip.read_by] += 1
        return clip


def _note_failure(store: Path, run: int, error: DataError, claims: Claims) -> None:
    """Leave word of a run that failed, for `mm data status`."""
    problem = error.problems[0]
    said = {"host": claims.owner.host, "pid": claims.owner.pid, "error": problem.id, "message": problem.message}
    content = json.dumps(said).encode()
    with suppress(DataError):  # where nothing can be written, that is the error which is told
        make_folder(store / WORK / FAILED, "the store's folder")
        write_atomically(store / WORK / FAILED / claim_name(run), [content], len(content))
