"""Layouts of context parallelism that the tests of attention run, and the traffic that formulas expect of each."""

from dataclasses import dataclass

WORLD, BATCH, CHUNK, HEADS, WIDTH = 8, 2, 3, 12, 5


@dataclass(frozen=True)
class Layout:
    cp: int
    ulysses: int = 1
    window: int = 1
    overlap: bool = False

    @property
    def ring(self) -> int:
        return self.cp // self.ulysses

    def groups(self) -> list[range]:
        """As many groups as the world has room for, where they fill it; else one."""
        return [range(first, first + self.cp) for first in range(0, WORLD, self.cp)][: WORLD // self.cp]


LAYOUTS = {
    **{f"ring-{cp}": Layout(cp) for cp in range(2, 9)},
    **{f"ring-{cp}-overlap": Layout(cp, overlap=True) for cp in (2, 3, 8)},
    **{f"ulysses-{cp}": Layout(cp, ulysses=cp) for cp in (2, 3, 4, 6)},
    "usp-2x2": Layout(4, ulysses=2),
    "usp-3x2": Layout(6, ulysses=3),
    "usp-2x4": Layout(8, ulysses=2),
    "usp-4x2-overlap": Layout(8, ulysses=4, overlap=True),
    "double-ring-2x2": Layout(4, window=2),
    "double-ring-one-window": Layout(4, window=4),
    "double-ring-3x2": Layout(6, window=3, overlap=True),
    "double-ring-2x4": Layout(8, window=2),
    "double-ring-4x2": Layout(8, window=4),
    "double-ring-4x2-overlap": Layout(8, window=4, overlap=True),
    "usp-2-in-double-ring-2x2": Layout(8, ulysses=2, window=2),
}
DRY = Layout(16, ulysses=4, window=2, overlap=True)


def formulas(layout: Layout) -> tuple[list[float], list[dict[str, int]]]:
    """Bytes that a rank sends in forward and backward, with values in bf16 and travelling gradients in fp32, and calls.

    s d m / P for each all-to-all of a tensor with 2 bytes, and (R - 1) hops of a chunk for each of k, v, dk, dv.
    """
    tokens, width, ulysses, ring = layout.cp * CHUNK, HEADS * WIDTH, layout.ulysses, layout.ring
    all_to_all = BATCH * 8 * tokens * width / layout.cp * (ulysses - 1) / ulysses
    hops = BATCH * 4 * tokens * (width / ulysses) * (ring - 1) / ring
    calls = []
    for exchanges in (ring - 1, 2 * (ring - 1)):
        expected = {"alltoall_base_": 2 * (ulysses > 1), "send": exchanges, "recv_": exchanges}
        calls.append({name: count for name, count in expected.items() if count})
    return [all_to_all + hops, all_to_all + 3 * hops], calls
