"""Names a rank that keeps the others waiting, from what each rank was seen doing (`mm.supervise.watchdog`).

All ranks take equally long for a step, because they wait for each other; what differs is how much of it a rank spends
on work of its own. That is told apart by looking at the stack four times a second. On an accelerator the process only
hands out work, so there it shows slow hosts and slow data; the device itself is timed with a few matrix products.

Looks are a sample, and of many equal ranks one always has the most. A rank is named only where chance does not explain
what was seen (Fisher's exact test against the middle half of the ranks, corrected for their number) and where the
difference matters. A device is named only where two comparisons in a row agree.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm.device.backend import Backend
from mm.parallel.mesh import Mesh
from mm.supervise.watchdog import Watchdog
from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.memory_breakdown import Phase
from mm.train.records import Record

logger = logging.getLogger(__name__)

STEP_PHASES: tuple[Phase, ...] = (
    "waiting for data",
    "forward and backward",
    "reducing gradients",
    "the optimizer's update",
)
LEAST_LOOKS = 100
"""Of each rank, before ranks are compared."""
FALSE_ALARMS = 0.01
"""Share of the comparisons of equal ranks in which chance names one of them, at most."""
SLOW = 1.2
"""Times the usual own work."""
LEAST_SHARE = 0.05
"""Of a step, by which a slow rank's own work is longer: about what it costs the others."""
SLOW_DEVICE = 1.1
"""Times what the median rank's device takes for the same products, in two comparisons in a row."""


@dataclass(frozen=True)
class Looks:
    """Looks at a rank, counted by what it was seen doing.

    Attributes:
        own: looks in which it worked on its own, in each of `STEP_PHASES`. all: looks in these phases.
    """

    own: Sequence[int]
    all: int

    @property
    def share(self) -> float:
        """Share of its time that it works on its own."""
        return sum(self.own) / self.all


@dataclass(frozen=True)
class Straggler:
    """A slow rank.

    Attributes:
        share: of its time that it works on its own. usual: that of the usual rank. phase: where they differ most.
    """

    rank: int
    share: float
    usual: float
    phase: Phase


class Stragglers(Callback):
    """Compares the ranks of a run (`--straggler-interval`)."""

    def __init__(self, watch: Watchdog, mesh: Mesh, backend: Backend, interval: int = 1) -> None:
        """Begin to count; compare every `interval` steps."""
        self.every = Every(interval)
        self._watch, self._mesh, self._backend = watch, mesh, backend
        self._seen: Counter[tuple[str, bool]] = Counter()
        self._slow_before: set[int] = set()  # the ranks whose devices were slow in the comparison before

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Compare."""
        self.compare(done.step)
        return ()

    def compare(self, step: int) -> None:
        """Compare what was seen since the last comparison; every rank calls it, rank 0 tells."""
        self._seen += self._watch.take_samples()
        own = [self._seen[phase, False] for phase in STEP_PHASES]
        looks = sum(count for (phase, _), count in self._seen.items() if phase in STEP_PHASES)
        rows = [Looks([int(count) for count in row[:-1]], int(row[-1])) for row in self._of_all([*own, looks])]
        if min(row.all for row in rows) < LEAST_LOOKS:
            return
        self._seen.clear()
        seconds = [took for (took,) in self._of_all([product_seconds(self._backend)])]
        slow, before = slow_devices(seconds), self._slow_before
        self._slow_before = {rank for rank, _, _ in slow}
        if self._mesh_rank_is_first():
            _tell_devices(step, [found for found in slow if found[0] in before])
            _tell_ranks(step, find(rows))

    def _of_all(self, values: Sequence[float]) -> list[list[float]]:
        """Values that every rank passes, by rank."""
        row = torch.tensor(values, dtype=torch.float32, device=self._backend.device)
        gathered: list[list[float]] = self._mesh.gather(row).tolist()
        return gathered

    def _mesh_rank_is_first(self) -> bool:
        mesh = self._mesh
        return mesh.tp_rank == mesh.cp_rank == mesh.dp_rank == mesh.pp_rank == 0


def _tell_devices(step: int, slow: Sequence[tuple[int, float, float]]) -> None:
    for rank, took, usual in slow:
        logger.warning(
            "step %d | slow device of rank %d: it takes %.1f ms for the matrix products that the median rank's takes "
            "%.1f ms for",
            step,
            rank,
            1e3 * took,
            1e3 * usual,
        )


def _tell_ranks(step: int, found: Sequence[Straggler]) -> None:
    for slow in found:
        logger.warning(
            "step %d | slow rank %d: it works on its own for %.0f%% of a step, the usual rank for %.0f%%; the "
            "difference is in the phase: %s",
            step,
            slow.rank,
            100 * slow.share,
            100 * slow.usual,
            slow.phase,
        )


def product_seconds(backend: Backend) -> float:
    """Time of the device for some matrix products, a few milliseconds; the median of five tries."""
    size, products, dtype = (256, 16, torch.float32) if backend.kind == "cpu" else (2048, 64, torch.bfloat16)
    factor = torch.ones(size, size, dtype=dtype, device=backend.device)
    product, tries = torch.empty_like(factor), []
    for _ in range(5):
        backend.synchronize()
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(factor, factor, out=product)
        backend.synchronize()
        tries.append(time.perf_counter() - started)
    return statistics.median(tries)


def slow_devices(seconds: Sequence[float]) -> list[tuple[int, float, float]]:
    """(rank, seconds, the median rank's) of the ranks whose `product_seconds` are too many, the slowest first."""
    usual = statistics.median_low(seconds)
    slow = [(rank, took, usual) for rank, took in enumerate(seconds) if took > SLOW_DEVICE * usual]
    return sorted(slow, key=lambda found: -found[1])


def find(ranks: Sequence[Looks]) -> list[Straggler]:
    """The slow ones among all ranks, the slowest first.

    Args:
        ranks: what each was seen doing, `LEAST_LOOKS` of each at least.
    """
    usual = _middle_half(ranks)
    found = []
    for rank, looks in enumerate(ranks):
        matters = looks.share > SLOW * usual.share and looks.share >= usual.share + LEAST_SHARE
        if matters and chance(looks, usual) <= FALSE_ALARMS / len(ranks):
            beyond = [own / looks.all - other / usual.all for own, other in zip(looks.own, usual.own, strict=True)]
            found.append(Straggler(rank, looks.share, usual.share, STEP_PHASES[beyond.index(max(beyond))]))
    return sorted(found, key=lambda slow: -slow.share)


def _middle_half(ranks: Sequence[Looks]) -> Looks:
    """All looks at the ranks in the middle: many looks, and none at a few slow ranks."""
    half = max(len(ranks) // 2, 1)
    first = (len(ranks) - half) // 2
    middle = sorted(ranks, key=lambda looks: looks.share)[first : first + half]
    own = [sum(counts) for counts in zip(*(looks.own for looks in middle), strict=True)]
    return Looks(own, sum(looks.all for looks in middle))


def chance(looks: Looks, usual: Looks) -> float:
    """Probability that one of two equal ranks is seen working on its own at least so much more often than the other.

    Source: Fisher 1935, "The logic of inductive inference": given how often both were seen working, the first one's
    part of it is hypergeometric.
    """
    working = sum(looks.own) + sum(usual.own)
    both = _log_ways(looks.all + usual.all, working)
    counts = range(sum(looks.own), min(working, looks.all) + 1)
    return sum(math.exp(_log_ways(looks.all, count) + _log_ways(usual.all, working - count) - both) for count in counts)


def _log_ways(of: int, chosen: int) -> float:
    return math.lgamma(of + 1) - math.lgamma(chosen + 1) - math.lgamma(of - chosen + 1)
