"""Measures each step: loss, gradient norm, rate, throughput, memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mm.train.callbacks.base import Callback, Every, StepDone
from mm.train.flops import train_flops
from mm.train.records import Record, StepMetrics
from mm.train.run import Run
from mm.train.running_mean import RunningMean


class Metrics(Callback):
    """Makes the line of metrics.jsonl of every step."""

    every = Every(1)
    collective = False

    def __init__(self, run: Run, losses: Iterable[float]) -> None:
        """Begin to measure.

        Args:
            run: the run. losses: of the steps before, for their mean.
        """
        self._run, self._recent = run, RunningMean(losses)

    def after_step(self, done: StepDone) -> Sequence[Record]:
        """Measure a step."""
        run, result, statistics = self._run, done.result, done.result.statistics
        varies = run.sections.optimizer.abnormal_clip_start is not None
        share = run.trained.share
        flops = sum(train_flops(run.config, tokens, trained_share=share) for tokens in done.tokens)
        metrics = StepMetrics(
            step=done.step,
            loss=statistics.loss,
            loss_hex=statistics.loss.hex(),
            grad_norm=statistics.grad_norm,
            grad_norm_hex=statistics.grad_norm.hex(),
            lr=result.lr,
            consumed_samples=done.progress.trained_samples,
            tokens_per_s=sum(done.tokens) / done.seconds,
            tflops=flops / run.comm.world_size / done.seconds / 1e12,
            peak_memory_gb=run.backend.peak_memory_bytes() / 1e9,
            step_time_s=done.seconds,
            skipped=not result.updated,
            tokens=sum(done.tokens),
            token_pairs=sum(tokens**2 for tokens in done.tokens),
            timesteps=tuple(round(timestep, 3) for timestep in self._timesteps(done)),
            clip_limit=result.clip_limit if varies else None,
            sample_losses=tuple(self._losses(done)),
        )
        return [metrics.with_mean(self._recent)]

    def _losses(self, done: StepDone) -> list[float]:
        """Losses of this replica's samples, in the order of the timesteps."""
        rows = zip(done.batches, done.result.statistics.losses[self._run.mesh.dp_rank], strict=True)
        return [loss for batch, row in rows for loss in row[: len(batch["sample"])].tolist()]

    def _timesteps(self, done: StepDone) -> list[float]:
        """Timesteps of this replica's samples, which are keyed and so can be drawn again."""
        seed = self._run.sections.training.seed
        flow = done.models.flows[done.index]
        drawn = [
            flow.draw_timesteps(seed, batch["sample"], batch["draw"], batch.get("place"))[1] for batch in done.batches
        ]
        values: list[float] = torch.cat(drawn).tolist()
        return values
