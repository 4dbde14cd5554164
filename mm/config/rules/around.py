"""Rules about what is looked at between the steps of a training run: rendered clips, replicas, slow ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _clips_have_a_place(run: TrainingRun) -> Iterator[Problem]:
    """CFG-124: rendered clips go somewhere."""
    if run.validation is not None and run.checkpoint.save is None:
        save = run.origins["checkpoint.save"].name
        found = f"{run.origins['validation.interval'].name} needs {save}, where the clips go."
        yield Problem("CFG-124", found, f"Give {save}.")


def _replicas_are_comparable(run: TrainingRun) -> Iterator[Problem]:
    """CFG-126: comparing weights needs ranks that hold the same ones."""
    if run.supervision.replica_hash_interval is None or run.dp is None:
        return
    zero = run.parallel.layerzero
    if run.dp * run.cp == (1 if zero is None else zero.zero3_size):
        word = run.origins["supervision.replica_hash_interval"].name
        found = f"{word} has no effect: no two of the processes hold the same weights."
        yield Problem("CFG-126", found, "Remove it.")


def _ranks_are_comparable(run: TrainingRun) -> Iterator[Problem]:
    """CFG-128: a slow rank is one that is slower than others."""
    if run.supervision.straggler_interval is not None and run.world_size == 1:
        word = run.origins["supervision.straggler_interval"].name
        yield Problem("CFG-128", f"{word} has no effect: there is one process.", "Remove it.")


AROUND_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    _clips_have_a_place,
    _replicas_are_comparable,
    _ranks_are_comparable,
)
