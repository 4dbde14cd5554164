"""Names a rank that keeps the others waiting, from what each rank was seen doing (`mm.parallel.watch`).

All ranks take equally long for a step, because they wait for each other; what differs is how much of it a rank spends
on work of its own. That is told apart by looking at the stack four times a second. On an accelerator the process only
hands out work, so there it shows slow hosts and slow data; the device itself is timed with a few matrix products.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm.device.backend import Backend
from mm.parallel.mesh import Mesh
from mm.parallel.watch import Watch
from mm.train.split import Phase

logger = logging.getLogger(__name__)

STEP_PHASES: tuple[Phase, ...] = ("waiting for data", "forward and backward", "reducing gradients",
                                  "the optimizer's update")  # fmt: skip
LEAST_LOOKS = 100
"""Of each rank, so that chance does not make a straggler."""
SLOW = 1.2
"""Times the median rank's own work, or its time for the same products."""


@dataclass(frozen=True)
class Straggler:
    """A slow rank.

    Attributes:
        share: of its time that it works on its own. usual: that of the median rank. phase: where they differ most.
    """

    rank: int
    share: float
    usual: float
    phase: Phase


class Stragglers:
    """Compares the ranks of a run."""

    def __init__(self, watch: Watch, mesh: Mesh, backend: Backend) -> None:
        """Begin to count."""
        self._watch, self._mesh, self._backend = watch, mesh, backend
        self._seen: Counter[tuple[str, bool]] = Counter()

    def compare(self, step: int) -> None:
        """Compare what was seen since the last comparison; every rank calls it, rank 0 tells."""
        self._seen += self._watch.take_samples()
        own = [self._seen[phase, False] for phase in STEP_PHASES]
        looks = sum(count for (phase, _), count in self._seen.items() if phase in STEP_PHASES)
        rows = self._of_all([*own, looks])
        if min(row[-1] for row in rows) < LEAST_LOOKS:
            return
        self._seen.clear()
        seconds = [took for (took,) in self._of_all([product_seconds(self._backend)])]
        if self._mesh_rank_is_first():
            for rank, took, usual in slow_devices(seconds):
                logger.warning(
                    "step %d | slow device of rank %d: it takes %.1f ms for the matrix products that the median rank's "
                    "takes %.1f ms for",
                    step,
                    rank,
                    1e3 * took,
                    1e3 * usual,
                )
            for slow in find([[count / row[-1] for count in row[:-1]] for row in rows]):
                logger.warning(
                    "step %d | slow rank %d: it works on its own for %.0f%% of a step, the median rank for %.0f%%; the "
                    "difference is in the phase: %s",
                    step,
                    slow.rank,
                    100 * slow.share,
                    100 * slow.usual,
                    slow.phase,
                )

    def _of_all(self, values: Sequence[float]) -> list[list[float]]:
        """What every rank passes, by rank."""
        row = torch.tensor(values, dtype=torch.float32, device=self._backend.device)
        gathered: list[list[float]] = self._mesh.gather(row).tolist()
        return gathered

    def _mesh_rank_is_first(self) -> bool:
        mesh = self._mesh
        return mesh.tp_rank == mesh.cp_rank == mesh.dp_rank == mesh.pp_rank == 0


def product_seconds(backend: Backend) -> float:
    """What the device takes for some matrix products, a few milliseconds; the least of three tries."""
    size, products, dtype = (256, 16, torch.float32) if backend.kind == "cpu" else (2048, 64, torch.bfloat16)
    factor = torch.ones(size, size, dtype=dtype, device=backend.device)
    product, tries = torch.empty_like(factor), []
    for _ in range(3):
        backend.synchronize()
        started = time.perf_counter()
        for _ in range(products):
            torch.mm(factor, factor, out=product)
        backend.synchronize()
        tries.append(time.perf_counter() - started)
    return min(tries)


def slow_devices(seconds: Sequence[float]) -> list[tuple[int, float, float]]:
    """(rank, seconds, the median rank's) of the ranks whose `product_seconds` are too many, the slowest first."""
    usual = statistics.median_low(seconds)
    slow = [(rank, took, usual) for rank, took in enumerate(seconds) if took > SLOW * usual]
    return sorted(slow, key=lambda found: -found[1])


def find(shares: Sequence[Sequence[float]]) -> list[Straggler]:
    """The slow ones among all ranks, the slowest first.

    Args:
        shares: of each rank, the share of its time that it works on its own in each of `STEP_PHASES`.
    """
    totals = [sum(row) for row in shares]
    usual = statistics.median_low(totals)
    middle = [statistics.median_low(column) for column in zip(*shares, strict=True)]
    found = []
    for rank, (row, total) in enumerate(zip(shares, totals, strict=True)):
        if total > SLOW * usual:
            beyond = [share - other for share, other in zip(row, middle, strict=True)]
            found.append(Straggler(rank, total, usual, STEP_PHASES[beyond.index(max(beyond))]))
    return sorted(found, key=lambda slow: -slow.share)
