"""One clear error for a run out of memory (MEM-001): what failed, what is held by kind, which flags would help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from mm.config.run.training import TrainingRun
from mm.config.units import GIB, in_gib
from mm.device.backend import Backend
from mm.device.out_of_memory import bytes_asked_for
from mm.errors import OutOfMemoryError
from mm.optim.optimizer import Optimizer
from mm.parallel.apply import ParallelModel
from mm.train.memory_advice import advise
from mm.train.memory_breakdown import MemoryBreakdown, Phase, measure

_PACKAGE = Path(__file__).parents[1]


class MemoryWatch:
    """Turns a failed allocation of this rank into MEM-001; every other exception passes unchanged.

    Attributes:
        models: what is built until now, with its optimizer as soon as that is there; their memory is told by kind.
        pinned_host: bytes of page-locked host memory, for offload.
    """

    pinned_host: int = 0

    def __init__(self, sections: TrainingRun, backend: Backend, rank: int) -> None:
        """Begin before the model is built: what the process holds now is not the model's.

        Args:
            sections: the run. backend: its device. rank: in the job.
        """
        self._sections, self._backend, self._rank = sections, backend, rank
        self._program = backend.peak_memory_bytes()
        self.models: list[tuple[ParallelModel, Optimizer | None]] = []

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Enter this around a phase of the run.

        Raises:
            OutOfMemoryError: MEM-001, from the exception of the allocator.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not self._backend.is_out_of_memory(error):
                raise
            raise self._explained(phase, error) from error

    def _explained(self, phase: Phase, error: BaseException) -> OutOfMemoryError:
        """The failed step's tensors are still alive here, kept by the traceback: nothing large may be made."""
        asked, peak = bytes_asked_for(error), self._backend.peak_memory_bytes()
        breakdown = measure(
            phase,
            asked or 0,
            peak=peak,
            program=self._program,
            models=self.models,
            pinned_host=self.pinned_host,
        )
        size = "of unknown size" if asked is None else f"of {in_gib(asked, 3)} GiB"
        told = [
            f"Rank {self._rank} ran out of memory in the phase: {phase}; an allocation {size} {_place(error)} failed.",
            _held(breakdown, built=bool(self.models)),
        ]
        device = self._backend.total_and_free_bytes()
        if device is not None:
            told.append(f"The device has {in_gib(device[0], 3)} GiB, of which {in_gib(device[1], 3)} GiB are free.")
        found = enumerate(advise(self._sections, breakdown), start=1)
        advice = "; ".join(f"({number}) {change}" for number, change in found)
        return OutOfMemoryError("MEM-001", " ".join(told), f"Try one of these, best first: {advice}.")


def _held(breakdown: MemoryBreakdown, *, built: bool) -> str:
    kinds = {
        "parameters" if built else "the unfinished model": breakdown.parameters,
        "gradients": breakdown.gradients,
        "optimizer state": breakdown.optimizer,
        "activations and temporaries": breakdown.activations,
        "the program before the model": breakdown.program,
    }
    told = {kind: round(1000 * size / GIB) for kind, size in kinds.items() if size}
    # the sum of what is told, not of the bytes: a reader adds it up
    text = f"It held {sum(told.values()) / 1000:.3f} GiB: "
    text += ", ".join(f"{kind} {size / 1000:.3f}" for kind, size in told.items()) + "."
    if breakdown.moments_to_come:
        text += f" Moments of {in_gib(breakdown.moments_to_come, 3)} GiB are still to come."
    if breakdown.pinned_host:
        text += f" On the host {in_gib(breakdown.pinned_host, 3)} GiB are pinned."
    return text


def _place(error: BaseException) -> str:
    """The line of this package that asked for memory last."""
    here = "outside this program"
    for frame, line in walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE) and frame.f_code.co_name != "__torch_function__":  # passes calls on
            here = f"at mm/{file.relative_to(_PACKAGE)}:{line} ({frame.f_code.co_name})"
    return here
