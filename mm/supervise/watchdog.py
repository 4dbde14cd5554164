"""Watches a process from a thread beside it: names the rank that keeps a job from going on, and ends a failed job.

The run marks its phases (`Watchdog.during`). All ranks pass through the same phases in the same order, so the count of
phases says who is behind. When a process stays in one for too long it raises the alarm; then every process that can
still answer writes its stacks to a file and says what it is doing, the table of all is printed with the suspect first,
and all leave with exit code 124, before a collective's own time limit says less about it.

What a process is doing is read from the stack of its threads: whether it waits for other ranks, and where. That costs
nothing in between, needs no wrapper around any collective, and works while a collective waits, which it does without
Python's lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tabulate import tabulate

from mm.errors import (
    EXIT_HANG,
    EXIT_INTERNAL,
    EndedElsewhereError,
    HangError,
    LostProcessError,
    MMError,
    format_error,
    say,
)
from mm.supervise.limits import Limits
from mm.supervise.mailbox import Failure, Mailbox, StoreLostError
from mm.supervise.stacks import where_is

logger = logging.getLogger(__name__)

SAMPLE_S, LOOK_S = 0.25, 1.0
"""Between looks at the stack, and at what the others have told."""
TOLD_S, SILENT_S = 30.0, 120.0
"""How often at least a process tells what it is doing, and after how long without it counts as stopped."""
STOOD_S = 5.0
"""Longer it is between two looks only where this process itself stood still: Ctrl-Z, `scontrol suspend`, a frozen
container."""
_OF_ANOTHER_RANK = "CKPT-033"
"""What `mm.checkpoint.comm` raises on the ranks beside one with a defect, which has more to say."""
ANSWER_S, LEAVE_S = 5.0, 10.0
"""How long a process is waited for when the alarm is raised, and for it to end by itself after another has failed."""
_LOST = (
    # gloo
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Timed out"),
    # NCCL, and torch's watchdog over it
    *("Connection closed by remote peer", "remote process exited", "ncclRemoteError"),
    *("communicator was aborted", "Watchdog caught collective operation timeout"),
    # HCCL: no word from a peer, no link to one
    *("EI0002", "EI0006", "call hccl api failed", "Heartbeat Lost"),
)
"""What collectives say, on each kind of device, when the process at the other end is gone."""


@dataclass
class Doing:
    """Activity of a process, as it or a neighbour tells it.

    Attributes:
        rank, host: of the process. step: that it is in, 0 before the first.
        phase: marked by the run. phases: entered so far. since_s: seconds in this one.
        waits: whether it waits for other ranks. where: the call and the line of this package that made it.
        answers: whether it said so itself.
    """

    rank: int
    host: str = ""
    step: int = 0
    phase: str = "starting"
    phases: int = 0
    since_s: float = 0.0
    waits: bool = False
    where: str = ""
    answers: bool = True


@dataclass(frozen=True)
class Alarm:
    """Some rank's word that it has been in one phase for longer than its limit, in seconds."""

    rank: int
    limit_s: float


class Watchdog:
    """The watch over one process; a context manager around the run.

    Attributes:
        samples: looks at the stack, by phase and whether the process waited for others, since `take_samples`.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        limits: Limits,
        folder: Path | None,
        leave: Callable[[int], None] = os._exit,
        sampling: bool = True,
    ) -> None:
        """Watch the thread that calls this.

        Args:
            mailbox: to and from the other processes.
            limits: of the phases.
            folder: where stacks go; None prints them.
            leave: ends the process.
            sampling: look at the stack all the time, for `samples`; else only when the alarm is raised.
        """
        self._mailbox, self._limits, self._folder, self._leave = mailbox, limits, folder, leave
        self._sampling = sampling
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self._now = Doing(mailbox.rank, socket.gethostname())
        self._since = time.monotonic()
        self._broke_in = ""
        self._last_s: dict[str, float] = {}
        self._steps: deque[float] = deque(maxlen=50)
        self._step_began: float | None = None
        self.samples: Counter[tuple[str, bool]] = Counter()
        self._patience: dict[tuple[int, int], float] = {}
        self._neighbour: tuple[Any, float] = None, float("inf")

    def begin_step(self, step: int) -> None:
        """Mark the beginning of a step."""
        now = time.monotonic()
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began, self._now.step = now, step
        self._sign()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Mark a phase while it is entered."""
        began, before = time.monotonic(), self._now.phase
        self._now.phase, self._broke_in = phase, ""
        self._sign()
        try:
            yield
        except BaseException:
            self._broke_in = self._broke_in or phase  # of phases in one another the inner one
            raise
        finally:
            self._last_s[phase] = time.monotonic() - began
            self._now.phase = before
            self._sign()

    def take_samples(self) -> Counter[tuple[str, bool]]:
        """Counts of what was seen since the last call: phase, and whether the process waited."""
        taken, self.samples = self.samples, Counter()
        return taken

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching; after an exception tell the others, or leave the word to the one that failed first.

        Raises:
            EndedElsewhereError: another process has failed before this one.
            LostProcessError: RUN-004 when another process has gone without a word.
        """
        self._over.set()
        try:
            self._end_of(error)
        finally:
            # A thread that is in the store's code when the interpreter goes away ends the process by SIGABRT.
            self._thread.join(2 * ANSWER_S)

    def _end_of(self, error: BaseException | None) -> None:
        if not isinstance(error, Exception | SystemExit):
            return
        rank, lost = self._mailbox.rank, isinstance(error, RuntimeError) and any(s in str(error) for s in _LOST)
        told_of = isinstance(error, MMError) and error.id == _OF_ANOTHER_RANK
        if (lost or told_of) and (failure := self._wait_for_a_word()) is not None:
            raise EndedElsewhereError(failure.exit_code) from None
        if lost:
            reason = str(error).splitlines()[0].partition(". This is ")[0]  # gloo goes on with advice of its own
            phase = self._broke_in or self._now.phase
            error = LostProcessError(
                "RUN-004",
                f"Rank {rank} lost another process of the job in the phase: {phase} ({reason}).",
                "Read the log of the process that died, and the kernel's on its node: memory is the usual cause. The "
                "same command goes on from the newest checkpoint.",
            )
        code, text = EXIT_INTERNAL, f"{type(error).__name__}: {error}"
        if isinstance(error, MMError):
            code, text = error.exit_code, format_error(error)
        elif isinstance(error, SystemExit):
            code, text = int(error.code or 0), "it was asked to stop"
        if not self._mailbox.publish(Failure(rank, code, text)):
            with contextlib.suppress(StoreLostError):
                failure = self._mailbox.failure()
                code = code if failure is None else failure.exit_code
            raise EndedElsewhereError(code) from None
        if lost:
            raise error from None

    def _wait_for_a_word(self) -> Failure | None:
        """The failure that another process tells, if it does so soon."""
        until = time.monotonic() + LEAVE_S / 2
        while time.monotonic() < until:
            with contextlib.suppress(StoreLostError):
                failure = self._mailbox.failure()
                if failure is not None:
                    return failure
            time.sleep(0.1)
        return None

    def _sign(self) -> None:
        self._now.phases += 1
        self._since = time.monotonic()

    def _limit(self) -> float:
        return self._limits.of(self._now.phase, list(self._steps), self._last_s.get(self._now.phase, 0.0))

    def _run(self) -> None:
        try:
            self._watch()
        except Exception:  # a thread's end goes unnoticed otherwise
            logger.exception("the watch over rank %d has ended; hangs are not named any more", self._mailbox.rank)

    def _watch(self) -> None:
        looked = told = 0.0
        before = time.monotonic()
        while not self._over.wait(SAMPLE_S):
            now = time.monotonic()
            if now - before > STOOD_S:  # no time of the phase it is in
                self._since += now - before
            before = now
            if self._sampling:
                waits, _ = where_is(self._watched)
                self.samples[self._now.phase, waits] += 1
            if now - looked < LOOK_S:
                continue
            looked = now
            try:
                if self._mailbox.world_size > 1 and now - told > min(TOLD_S, self._limit() / 4):
                    self._mailbox.write(f"seen {self._mailbox.rank}", {**asdict(self._now), "at": time.time()})
                    told = now
                self._tell_patience(now)
                self._look(now)
            except StoreLostError as error:
                if now - self._since > self._limit():
                    self._alone(str(error))

    def _look(self, now: float) -> None:
        failure = self._mailbox.failure()
        if failure is not None and failure.rank != self._mailbox.rank:
            if not self._over.wait(LEAVE_S):  # the collective it waits in will not end
                self._leave(failure.exit_code)
            return
        limit, waited = self._limit(), now - self._since
        stands = waited > limit or (limit == float("inf") and self._neighbour_is_silent(now))
        if stands and not self._others_are_patient(now) and not self._over.is_set():
            self._mailbox.claim("alarm", asdict(Alarm(self._mailbox.rank, min(limit, waited))))
        alarm = self._mailbox.record(Alarm, "alarm")
        if alarm is not None:
            self._answer(alarm.limit_s)

    def _others_are_patient(self, now: float) -> bool:
        """Find another process that has told that it waits by a limit of its own, and has time left."""
        for rank, phases, seconds in self._mailbox.roll("patience"):
            self._patience.setdefault((rank, phases), now + seconds)
        return any(now < until for (rank, _), until in self._patience.items() if rank != self._mailbox.rank)

    def _tell_patience(self, now: float) -> None:
        """Tell those that wait for this process, whose alarm would come before its own limit says what it waits for."""
        mine, seconds = (self._mailbox.rank, self._now.phases), self._limits.patience.get(self._now.phase, 0.0)
        if now - self._since > min(TOLD_S, seconds / 8) and 0 < seconds < float("inf") and mine not in self._patience:
            self._mailbox.append("patience", [*mine, seconds])
            self._patience[mine] = now + seconds

    def _neighbour_is_silent(self, now: float) -> bool:
        """Notice a next rank that has told nothing for long: in a phase without a limit nothing else shows its end."""
        if self._mailbox.world_size == 1:
            return False
        told = self._mailbox.read(f"seen {(self._mailbox.rank + 1) % self._mailbox.world_size}")
        if told != self._neighbour[0] or self._neighbour[1] > now:
            self._neighbour = told, now
        return now - self._neighbour[1] > SILENT_S

    def _answer(self, limit_s: float) -> None:
        """Say what this process is doing; the first rank that answers prints what all said."""
        self._write_stacks()
        me = self._doing()
        self._mailbox.write(f"doing {me.rank}", asdict(me))
        until, ranks = time.monotonic() + ANSWER_S, range(self._mailbox.world_size)
        said: dict[int, Doing] = {}
        while len(said) < len(ranks) and time.monotonic() < until:
            for rank in ranks:
                told = None if rank in said else self._mailbox.record(Doing, f"doing {rank}")
                if told is not None:
                    said[rank] = told
            time.sleep(0.1)
        if min(said) == me.rank:
            everyone = [said.get(rank) or self._last_seen(rank) for rank in ranks]
            error = hang(everyone, limit_s, self._folder)
            if self._mailbox.publish(Failure(me.rank, EXIT_HANG, format_error(error))):
                tell_and_flush(table(everyone), error)
        else:
            time.sleep(2)  # a launcher ends all processes when the first is gone: let it print
        self._leave(EXIT_HANG)

    def _alone(self, reason: str) -> None:
        """The store is gone too, and with it the process or node that keeps it."""
        self._write_stacks()
        error = HangError(
            "RUN-003",
            f"Rank {self._mailbox.rank} has made no progress for {time.monotonic() - self._since:.0f} s, and the job's "
            f"store does not answer ({reason}).",
            "Look at the node of MASTER_ADDR, which keeps the store, and at its network.",
        )
        tell_and_flush(table([self._doing()]), error)
        self._leave(EXIT_HANG)

    def _last_seen(self, rank: int) -> Doing:
        """Activity of a process that does not answer, as it told last."""
        told = self._mailbox.read(f"seen {rank}") or {"rank": rank, "at": time.time()}
        told["since_s"] = told.get("since_s", 0.0) + time.time() - told.pop("at")
        return Doing(**{**told, "answers": False, "where": "does not answer"})

    def _doing(self) -> Doing:
        waits, where = where_is(self._watched)
        values = {**asdict(self._now), "since_s": time.monotonic() - self._since, "waits": waits, "where": where}
        return Doing(**values)

    def _write_stacks(self) -> None:
        with contextlib.suppress(OSError):  # a full disk must not hide who hangs
            if self._folder is None:
                faulthandler.dump_traceback(all_threads=True)
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank-{self._mailbox.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)


def tell_and_flush(text: str, error: MMError) -> None:
    """Print on standard error what a process that ends without unwinding has to say; the error's line comes last."""
    print(text, file=sys.stderr, flush=True)
    say(error)


def hang(everyone: list[Doing], limit_s: float, folder: Path | None) -> HangError:
    """The error that names the suspect."""
    ordered = by_suspicion(everyone)
    first = ordered[0]
    if not first.answers:
        who = f"Suspect: rank {first.rank} on {first.host or 'an unknown host'}, which does not answer"
    elif first.waits and len({(doing.phases, doing.waits) for doing in everyone}) == 1:
        who = f"All ranks wait for each other in the phase: {first.phase}; no one is behind"
    else:
        who = f"Suspect: rank {first.rank} on {first.host}, behind the others in the phase: {first.phase}"
    where = f"{folder}/rank-*.txt" if folder is not None else "the logs of all ranks"
    return HangError(
        "RUN-003",
        f"No progress for {limit_s:.0f} s in step {first.step}. {who}.",
        f"Read the stacks in {where}, and look at that node's device, disks and kernel log. The same command goes on "
        "from the newest checkpoint.",
    )


def by_suspicion(everyone: list[Doing]) -> list[Doing]:
    """Those who do not answer, silent for longest first; then who waits for nobody; then who is behind."""

    def order(doing: Doing) -> tuple[float, ...]:
        silent = 0.0 if doing.answers else -doing.since_s  # a busy node may answer late, and has not been silent long
        return doing.answers, silent, doing.waits, doing.phases, doing.rank

    return sorted(everyone, key=order)


def table(everyone: list[Doing], most: int = 32) -> str:
    """The processes as a table, the suspect first."""
    rows = [
        (doing.rank, doing.host, doing.step, doing.phase, f"{doing.since_s:.0f} s", doing.where)
        for doing in by_suspicion(everyone)
    ]
    text = tabulate(rows[:most], headers=["rank", "host", "step", "phase", "for", "in"], tablefmt="simple")
    return text if len(rows) <= most else f"{text}\n... and {len(rows) - most} more ranks"
