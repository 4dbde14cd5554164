"""One step of a run with nothing around it: samples in, update out, numbers that are not finite dealt with."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from mm.config.bad_samples import parse_on_bad_sample
from mm.data.packed import MicroBatch
from mm.data.replacing import check_replaced, replaced_in_step
from mm.data.sampler import BatchPlan
from mm.data.steps import StepBatches, step_batches
from mm.train.callbacks.base import StepDone
from mm.train.live import shared_steps
from mm.train.memory_breakdown import Phase
from mm.train.models import Models
from mm.train.numerics import NumericsGuard
from mm.train.run import Run
from mm.train.state import Progress
from mm.train.step import train_step

During = Callable[[Phase | None], AbstractContextManager[None]]
"""Makes what to enter for a phase."""


class ClosedStep:
    """Takes the steps of a run, one at a call."""

    def __init__(self, run: Run, models: Models, progress: Progress, during: During) -> None:
        """Begin to read samples.

        Args:
            run: the run. models: what is trained. progress: where it stands. during: for its phases.
        """
        self._run, self._models, self._during = run, models, during
        self._guards = [
            NumericsGuard(run, one.parallel, one.optimizer, flow)
            for one, flow in zip(models.started, models.flows, strict=True)
        ]
        self._steps = _steps(run, progress)

    def take(self, before: Progress) -> StepDone:
        """Take the step after `before`; every rank calls it.

        Raises:
            DataError, NumericsError: as documented where they arise.
        """
        run, since, step = self._run, time.monotonic(), before.step + 1
        run.watch.begin_step(step)
        with self._during("waiting for data"):
            data = next(self._steps)
        mine = data.batches
        trained = before.trained_samples + len(data.dealt.tokens)
        replaced = before.replaced_samples + _replaced(run, mine, before, trained)
        index = self._models.of_step(step)
        with self._during("exchanging experts" if self._models.stays else None):
            started = self._models.here(index)
        flow, guard = self._models.flows[index], self._guards[index]
        started.optimizer.set_progress(before.consumed_samples)  # rates follow the run's samples, whoever trained
        result = train_step(
            started.parallel,
            started.optimizer,
            flow,
            mine,
            samples=len(data.dealt.tokens),
            schedule_by=run.global_batch_size,
            seed=run.sections.training.seed,
            most_samples=data.dealt.most,
            during=self._during,
            on_nonfinite=partial(guard.refused, step, batches=mine, before=before.skipped_steps),
            asked_to_stop=lambda: run.is_asked_to_stop,
        )
        if result.updated:
            guard.accepted(step, result.statistics, mine)
        consumed = before.consumed_samples + run.global_batch_size
        progress = Progress(step, consumed, before.skipped_steps + (not result.updated), replaced, trained)
        seconds, last = time.monotonic() - since, step == run.sections.training.steps
        return StepDone(progress, self._models, index, result, mine, data.dealt.tokens, seconds, last)

    def close(self) -> None:
        """End the processes that read samples."""
        self._steps.close()


def _replaced(run: Run, batches: Sequence[MicroBatch], progress: Progress, trained: int) -> int:
    """Number of samples of the step that were replaced in all replicas; an error where --on-bad-sample allows fewer.

    Args:
        run, batches: the step. progress: before it. trained: samples up to and with it.
    """
    policy = parse_on_bad_sample(run.sections.data.on_bad_sample)
    if not policy.skips:
        return 0
    samples = [sample for batch in batches for sample in batch["sample"]]
    instead_of = [sample for batch in batches for sample in batch.get("replaced", [])]
    replaced = replaced_in_step(run.mesh.dp_rank, samples, instead_of, run.comm.all_gather_object)
    check_replaced(progress.replaced_samples + replaced, trained, len(run.dataset), policy)
    return replaced


def _steps(run: Run, progress: Progress) -> Generator[StepBatches]:
    sections, layout = run.sections, run.mesh.layout
    steps = step_batches(
        run.dataset,
        BatchPlan(
            run.global_batch_size,
            sections.data.micro_batch_size,
            run.mesh.dp_rank,
            layout.dp_size,
            num_stages=layout.pp_size,
            pack_tokens=sections.data.pack_tokens,
            pair_cost=sections.data.pair_cost,
            multiple=layout.micro_batches_come_in,
        ),
        text_len=run.config.text_len,
        seed=sections.training.seed,
        consumed_samples=progress.consumed_samples,
        caption_dropout=sections.data.caption_dropout,
        condition_dropout=sections.data.condition_dropout,
        shuffle=sections.data.shuffle,
        mixture=sections.data.mixture,
        min_bucket=sections.data.min_bucket,
        num_steps=sections.training.steps,
        num_workers=sections.data.workers,
        read_timeout=sections.data.read_timeout,
        on_bad_sample=parse_on_bad_sample(sections.data.on_bad_sample),
        pin_memory=sections.data.pin_memory and run.backend.kind != "cpu",
        with_noise=run.mesh.pp_rank in (0, layout.pp_size - 1),  # stages between do not see it
    )
    return steps if run.live is None else shared_steps(steps, run.mesh, run.backend)
