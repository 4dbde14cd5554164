"""Plan of which blocks' weights stay on the device, and which are copied there when they are needed.

Two places on the device take turns. While a block computes in one, the other is filled; a place that is let go of is
filled at once with the next block that is not there. So a copy has the computation of at least one block to hide
behind, and of more where blocks that stay lie in between. The blocks that are copied are therefore spread evenly: the
shortest time that any copy has is then as long as it can be.

Of n blocks either all stay, or at most n - 3: the two places hold two blocks, so that copying fewer than three would
save nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_PLACES = 2
"""On the device, for the blocks that are copied."""


@dataclass(frozen=True)
class BlockSize:
    """Size of one block: bytes of all its parameters, aligned (`mm.device.queues.aligned_bytes`), and their number."""

    num_bytes: int
    num_parameters: int


@dataclass(frozen=True)
class WeightPlan:
    """Places of blocks, by their number in the order in which they run.

    Attributes:
        copied: those that are copied to the device when they are needed, in order; all others stay there.
        from_files: those of them that do not wait in host memory but are read again.
    """

    copied: tuple[int, ...] = ()
    from_files: frozenset[int] = frozenset()

    def device_bytes(self, blocks: Sequence[BlockSize]) -> int:
        """Bytes that the blocks take on the device, the places included."""
        away = set(self.copied)
        staying = sum(block.num_bytes for number, block in enumerate(blocks) if number not in away)
        return staying + NUM_PLACES * self.place_bytes(blocks)

    def host_bytes(self, blocks: Sequence[BlockSize]) -> int:
        """Bytes of page-locked host memory, those into which files are read included."""
        waiting = sum(blocks[number].num_bytes for number in self.copied if number not in self.from_files)
        return waiting + (NUM_PLACES * self.place_bytes(blocks) if self.from_files else 0)

    def copied_bytes(self, blocks: Sequence[BlockSize]) -> int:
        """Bytes that are copied to the device for each forward."""
        return sum(blocks[number].num_bytes for number in self.copied)

    def place_bytes(self, blocks: Sequence[BlockSize]) -> int:
        """Bytes of one place on the device."""
        return max((blocks[number].num_bytes for number in self.copied), default=0)


def evenly(num_blocks: int, num_copied: int) -> tuple[int, ...]:
    """Numbers of the blocks that are copied, as far apart as they can be around the circle of forwards."""
    return tuple(n for n in range(num_blocks) if (n + 1) * num_copied // num_blocks > n * num_copied // num_blocks)


def fewest_copied(blocks: Sequence[BlockSize], device_bytes: int) -> WeightPlan | None:
    """The plan that copies the fewest blocks, with no more device memory than that; None where there is none."""
    plans = (WeightPlan(evenly(len(blocks), count)) for count in _counts(len(blocks)))
    return next((plan for plan in plans if plan.device_bytes(blocks) <= device_bytes), None)


def by_parameters(blocks: Sequence[BlockSize], num_parameters: int) -> WeightPlan:
    """The plan of which no more than so many parameters of blocks stay, and as many of them as can."""
    total = sum(block.num_parameters for block in blocks)
    plan = WeightPlan()
    for count in _counts(len(blocks)):
        plan = WeightPlan(evenly(len(blocks), count))
        if total - sum(blocks[number].num_parameters for number in plan.copied) <= num_parameters:
            break
    return plan


def within_host(plan: WeightPlan, blocks: Sequence[BlockSize], host_bytes: int) -> WeightPlan | None:
    """The plan with as few blocks read from files as leave the rest so much host memory; None where that is too little.

    Blocks that are read are spread evenly among those that are copied, so that reading has time, too.
    """
    count = len(plan.copied)
    choices = (
        WeightPlan(plan.copied, frozenset(plan.copied[n] for n in evenly(count, files))) for files in range(count + 1)
    )
    return next((choice for choice in choices if choice.host_bytes(blocks) <= host_bytes), None)


def least_device_bytes(blocks: Sequence[BlockSize]) -> int:
    """Device memory without which no plan can do."""
    return min(WeightPlan(evenly(len(blocks), count)).device_bytes(blocks) for count in _counts(len(blocks)))


def _counts(num_blocks: int) -> list[int]:
    """Numbers of blocks that it makes sense to copy, the fewest first."""
    return [0, *range(NUM_PLACES + 1, num_blocks + 1)]
