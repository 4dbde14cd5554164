"""What the benchmarks of an accelerator share: its clock, its memory figures, its peak, random weights."""

from __future__ import annotations

import gc
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from results import Result
from torch import Tensor

from mm.device.backend import Backend
from mm.parallel.mesh import Mesh

DENSE_BF16_PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""TFLOP/s without sparsity, from NVIDIA's data sheets, by a part of the device's name."""

LIMIT_S = 160.0
"""Seconds of one benchmark after which no further repetition starts."""

Kept = TypeVar("Kept")

WARM_UP, REPETITIONS, FEWEST = 3, 10, 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median of `count`, and the least and the most of them."""

    median: float
    least: float
    most: float
    count: int


@dataclass
class Bench:
    """One run of the benchmarks.

    Attributes:
        backend: the device. mesh: of this one process.
        tiny: on the CPU with tiny shapes, to see that everything runs; then nothing is timed and no figure is shown.
    """

    backend: Backend
    mesh: Mesh
    tiny: bool
    _started: float = field(default_factory=time.monotonic)
    _kept: list[Any] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """The torch device."""
        return self.backend.device

    @property
    def peak_tflops(self) -> float | None:
        """Dense bf16 peak of a device that is known by name."""
        return next((peak for name, peak in DENSE_BF16_PEAKS.items() if name in self.backend.name()), None)

    def begin(self) -> None:
        """A new benchmark: its time starts."""
        self._started = time.monotonic()

    def seconds(self, run: Callable[[], object], calls: int = 1) -> Timing:
        """Time a run that makes `calls` equal calls: seconds of one call.

        Warm-up first; then `REPETITIONS`, or fewer when the benchmark's time is up, but at least `FEWEST`.
        """
        found: list[float] = []
        for _ in range(0 if self.tiny else WARM_UP):
            run()
        self.reset_memory()
        for _ in range(1 if self.tiny else REPETITIONS):
            if len(found) >= FEWEST and time.monotonic() - self._started > LIMIT_S:
                break
            self.backend.synchronize()
            found.append(self.elapsed(self._to_its_end(run)) / calls)
        return Timing(statistics.median(found), min(found), max(found), len(found))

    def _to_its_end(self, run: Callable[[], object]) -> Callable[[], None]:
        def waited() -> None:
            run()
            self.backend.synchronize()

        return waited

    def elapsed(self, run: Callable[[], object]) -> float:
        """Seconds until a run returns; device work that it has not waited for goes on."""
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def reset_memory(self) -> None:
        """Forget the peaks of memory."""
        if not self.tiny:
            self._module.reset_peak_memory_stats()

    def memory(self) -> dict[str, float]:
        """Peaks of memory since `reset_memory`, as columns of a table; nothing on the CPU."""
        if self.tiny:
            return {}
        return {"GB allocated": self._module.max_memory_allocated() / 1e9,
                "GB reserved": self._module.max_memory_reserved() / 1e9}  # fmt: skip

    def guarded(self, what: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """`what` with the columns of `run`, or saying that memory did not suffice; it is free afterwards."""
        try:
            line = {**what, **run()}
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            line = {**what, "result": "out of memory"}
        self.free()
        return line

    def free(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        if not self.tiny:
            self._module.empty_cache()

    def keep(self, owner: Kept) -> Kept:
        """The same, alive to the end: page-locked memory stays registered at its address."""
        self._kept.append(owner)
        return owner

    def figures(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns, or in a tiny run only that it ran: a CPU's times are nobody's business."""
        return {"result": "ran"} if self.tiny else {"result": "ran", **columns}

    def result(self, name: str, shapes: dict[str, Any], flops: str = "") -> Result:
        """An empty result on this device."""
        return Result(name, self.backend.name() + (", tiny shapes" if self.tiny else ""), shapes, flops)

    @property
    def _module(self) -> Any:
        return getattr(torch, self.backend.kind)


def normal(shape: Sequence[int], key: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on the key, drawn on the device."""
    source = torch.Generator(device).manual_seed(zlib.crc32(key.encode()))
    return torch.randn(*shape, generator=source, device=device, dtype=dtype)


def weight(name: str, shape: Sequence[int], device: torch.device) -> Tensor:
    """A parameter's value without zeros: a fresh model's head is zero, and so are then nearly all gradients."""
    value = normal(shape, name, device).mul_(0.02)
    return value.add_(1) if "norm" in name and name.endswith("weight") else value


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error over largest value."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max())


def require(what: str, error: float, bound: float) -> None:
    """End the benchmarks when a result is wrong: a time of wrong numbers is worth nothing."""
    if not error <= bound:
        raise SystemExit(f"{what} differs from the fp32 reference by {error:.2e}, more than {bound:.2e}; not timed")
