"""Progress of an extraction, from what its workers leave in the store: `mm data status` asks it, and writes nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mm.data.store.catalog import is_sharded
from mm.data.store.shard import INDEX, KIND, shard_folder
from mm.data.store.table import read_table_header
from mm.errors import DataError
from mm.extract.claims import CLAIMS, all_claims
from mm.extract.former import FORMER
from mm.extract.plan import PLAN, TABLE, Plan, open_plan
from mm.extract.skipping import SKIPS, skip_counts
from mm.extract.store import WORK, runs_done
from mm.extract.worker import FAILED, claim_name

_RATE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Running:
    """A run of rows that a worker has claimed; seconds ago of its claim and of its last sign of life.

    `is_expired`: the worker is gone, and the next one takes over.
    """

    run: int
    host: str
    pid: int
    since_s: float
    seen_s: float
    is_expired: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """A run of rows that a worker gave up, and why."""

    run: int
    host: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """State of an extraction that is not finished.

    Attributes:
        runs, rows: of the plan; a run of rows is a shard of each draw. done, rows_done: of these are complete.
        running, failed: runs that are claimed, and that were given up and not made since.
        skipped: clips left out so far.
        kept: samples that are copied and not encoded: those that trainings made (--live), and of former shards.
        rate: rows a second in the last hour of work; None where no two runs tell. elapsed_s: since the first run was
            done. Both are of the work by this plan: what was made by one before it, as of fewer draws, is left out.
    """

    runs: int
    rows: int
    done: int
    rows_done: int
    running: Sequence[Running]
    failed: Sequence[Failed]
    skipped: int
    kept: int
    rate: float | None
    elapsed_s: float

    @property
    def to_do(self) -> int:
        """Runs that nobody has begun."""
        return self.runs - self.done - len(self.running)

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes at this rate."""
        return (self.rows - self.rows_done) / self.rate if self.rate else None


def extraction_progress(store: Path) -> Progress | None:
    """The progress of a store's extraction; None where it is finished, or was not made by one.

    Raises:
        DataError: DATA-150 for a plan that is damaged.
    """
    plan = open_plan(store)
    if plan is None or is_sharded(store):
        return None
    now = _server_time(store)
    done = runs_done(store, plan)
    counts = skip_counts(store / WORK / SKIPS)
    rate, elapsed = _rate(store, plan, done, now)
    return Progress(
        runs=plan.num_runs,
        rows=plan.num_rows,
        done=len(done),
        rows_done=sum(map(plan.rows_in, done)),
        running=_running(store, done, now),
        failed=_failed(store, done),
        skipped=sum(counts.values()),
        kept=_kept(store),
        rate=rate,
        elapsed_s=elapsed,
    )


def _kept(store: Path) -> int:
    total = 0
    for index in (store / FORMER).glob(f"[!.]*/{INDEX}"):
        with suppress(DataError, KeyError, TypeError, ValueError):
            total += int(read_table_header(index, KIND, "").about["samples"])
    return total


def _running(store: Path, done: set[int], now: float) -> list[Running]:
    found = []
    for claim in all_claims(store / WORK / CLAIMS):
        if claim.name.isdigit() and int(claim.name) not in done:
            host, pid = ("an unknown host", 0) if claim.owner is None else (claim.owner.host, claim.owner.pid)
            ago = max(0.0, now - claim.since), max(0.0, now - claim.touched)
            found.append(Running(int(claim.name), host, pid, *ago, claim.is_stale(now)))
    return found


def _failed(store: Path, done: set[int]) -> list[Failed]:
    folder = store / WORK / FAILED
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.isdigit() and int(path.name) not in done:
            said = json.loads(path.read_text())
            found.append(Failed(int(path.name), said["host"], said["error"], said["message"]))
    return [one for one in found if not (store / WORK / CLAIMS / claim_name(one.run)).exists()]


def _rate(store: Path, plan: Plan, done: set[int], now: float) -> tuple[float | None, float]:
    """Rows a second, and seconds since the first run of rows was done, by this plan."""
    planned = os.stat(store / PLAN / TABLE).st_mtime
    times = sorted((at, plan.rows_in(run)) for run in done if (at := _done_at(store, plan, run)) >= planned)
    if not times:
        return None, 0.0
    last = [(at, rows) for at, rows in times if at >= times[-1][0] - _RATE_S]
    span = last[-1][0] - last[0][0]
    rate = sum(rows for _, rows in last[1:]) / span if span > 0 else None
    return rate, max(0.0, now - times[0][0])


def _done_at(store: Path, plan: Plan, run: int) -> float:
    """Time of the last shard of a run, which has one of each draw."""
    return max(os.stat(shard_folder(store, shard) / INDEX).st_mtime for shard in plan.shards_of(run))


def _server_time(store: Path) -> float:
    """The newest time that the file server gave to a claim, or this machine's where that is later.

    Whoever asks may not write there, so that an expired claim is told by this machine's clock.
    """
    touched = [claim.touched for claim in all_claims(store / WORK / CLAIMS)]
    return max([time.time(), *touched])
