"""One optimizer step: draw noise and timesteps, run the schedule over the micro-batches, apply the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config.model import WanConfig
from mm.config.tasks.task import Entry, Task
from mm.data.loader import FeatureBatch
from mm.data.packed import MicroBatch, is_packed, segments_of
from mm.device.copies import to_device
from mm.diffusion.flow import FlowMatching
from mm.errors import NumericsError
from mm.optim.optimizer import Optimizer
from mm.optim.step_statistics import StepStatistics, gather_statistics
from mm.parallel.apply import ParallelModel
from mm.parallel.boundary import SequenceLengths
from mm.parallel.schedule import LossFunction, forward_backward
from mm.parallel.stage import WanStage
from mm.train.memory_breakdown import Phase
from mm.train.motion import has_motion, motion_losses
from mm.train.parts import Part, draw_parts, frames_of_parts, learned_elements, noisy_latents, timesteps_of_runs
from mm.wan.conditions.computed import computed
from mm.wan.inputs import ModelInputs, PackedInputs
from mm.wan.packed import joined
from mm.wan.patches import patchify, token_grid


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Attributes:
        statistics: losses and gradients. updated: whether they were applied.
        lr: the rate that was used. clip_limit: of the gradient norm; None where they were not applied.
    """

    statistics: StepStatistics
    updated: bool
    lr: float
    clip_limit: float | None = None


@dataclass(frozen=True)
class SampleCounts:
    """Numbers of samples, on which all replicas agree.

    Attributes:
        step: of the global batch. most: of the largest micro-batch of all replicas.
    """

    step: int
    most: int


def stop_at(statistics: StepStatistics) -> None:
    """Stop at numbers that are not finite where no guard decides (`mm.train.numerics`).

    Raises:
        NumericsError: NUM-001 for a loss, NUM-002 for a gradient.
    """
    remedy = "Look at the samples of this step; lower --lr, or resume from the checkpoint before."
    if not math.isfinite(statistics.loss):
        raise NumericsError("NUM-001", f"The loss is {statistics.loss}; no weight was changed.", remedy)
    raise NumericsError("NUM-002", f"The gradient norm is {statistics.grad_norm}; no weight was changed.", remedy)


def train_step(
    parallel: ParallelModel,
    optimizer: Optimizer,
    flow: FlowMatching,
    batches: Sequence[MicroBatch],
    *,
    samples: int,
    seed: int,
    most_samples: int | None = None,
    schedule_by: int | None = None,
    during: Callable[[Phase], AbstractContextManager[object]] = nullcontext,
    on_nonfinite: Callable[[StepStatistics], None] = stop_at,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Take one step. The process waits for the device once, to read what `agree` tells.

    Args:
        parallel: the model on the mesh.
        optimizer: its optimizer.
        flow: noise schedule and loss.
        batches: this replica's micro-batches of the step.
        samples: of the step, in all replicas.
        seed: of noise and timesteps.
        most_samples: of the largest micro-batch of all replicas; None where all have as many as the first.
        schedule_by: samples by which the learning-rate schedule advances; None for those of the step.
        during: makes what to enter for each phase of the step.
        on_nonfinite: called on every rank where a loss or gradient is not finite, before any weight has changed; the
            update is left out if it returns.
        asked_to_stop: whether this process was; asked when the gradients are there.

    Raises:
        NumericsError: what `on_nonfinite` raises.
    """
    with during("forward and backward"):
        counts = SampleCounts(samples, most_samples or len(batches[0]["sample"]))
        losses = compute_gradients(parallel, flow, batches, seed, counts)
    lr, limit = optimizer.learning_rate, None
    with during("reducing gradients"):
        optimizer.reduce_gradients()
        statistics = gather_statistics(parallel, optimizer, losses, asked_to_stop(), samples)
    if statistics.is_finite:
        limit = optimizer.clip_limit(statistics.grad_norm)
        with during("the optimizer's update"):
            optimizer.update(statistics.grad_norm, schedule_by or samples)
    else:
        on_nonfinite(statistics)
        optimizer.skip(schedule_by or samples)
    return StepResult(statistics, statistics.is_finite, lr, limit)


def compute_gradients(
    parallel: ParallelModel,
    flow: FlowMatching,
    batches: Sequence[MicroBatch],
    seed: int,
    counts: SampleCounts | None = None,
) -> Tensor:
    """Forward and backward of one step; the gradients stay where `Optimizer.reduce_gradients` finds them.

    Every sample of the step has the same weight, whichever micro-batch it is in. All replicas have as many
    micro-batches.

    Args:
        parallel, flow, batches, seed: as for `train_step`.
        counts: of samples; None where all micro-batches of all replicas have as many as the first.

    Returns:
        This rank's part of the weighted losses of its replica's samples, [micro-batches, `counts.most`] fp32 on the
        device: of its own tokens on the last pipeline stage, zeros elsewhere, where another rank has the same, and
        behind the last sample of a micro-batch.
    """
    dp_size = parallel.mesh.layout.dp_size
    first = len(batches[0]["sample"])
    counts = counts or SampleCounts(first * len(batches) * dp_size, first)

    def forward_step(stage: WanStage, module: Any, batch: MicroBatch) -> tuple[Tensor, LossFunction]:
        # The schedule takes the mean over micro-batches, and DDP that over replicas.
        share = len(batch["sample"]) * len(batches) * dp_size / counts.step
        output, loss_function = forward_micro_batch(stage, module, batch, flow, parallel, seed)

        def weighted(velocity: Tensor) -> tuple[Tensor, Tensor]:
            loss, of_samples = loss_function(velocity)
            return loss * share, F.pad(of_samples, (0, counts.most - len(of_samples)))

        return output, weighted

    losses = forward_backward(parallel, forward_step, batches, lambda batch: lengths_of(batch, parallel.wan))
    mesh = parallel.mesh
    if parallel.last and (mesh.layout.sequence_parallel or mesh.tp_rank == 0):
        return torch.stack(losses).float()
    return torch.zeros(len(batches), counts.most, device=parallel.backend.device)


def lengths_of(batch: MicroBatch, wan: WanConfig) -> SequenceLengths:
    """Sizes of a micro-batch."""
    segments = segments_of(batch)
    tokens = tuple(sum(token_counts(segment, wan)) for segment in segments)
    text_tokens = tuple(segment["text"].shape[1] for segment in segments)
    runs = tuple(len(frames_of_parts(segment, wan)) for segment in segments)
    return SequenceLengths(len(segments[0]["sample"]), tokens, text_tokens, runs)


def token_counts(segment: FeatureBatch, wan: WanConfig) -> tuple[int, int]:
    """Tokens of one sample: those in front of the video's, which nobody predicts, and the video's."""
    frames, height, width = segment["latents"].shape[2:]
    frames, rows, columns = token_grid((frames, height, width), wan.patch_size)
    ahead = sum(feature.name in segment["features"] for feature in wan.task.entering(Entry.TOKENS))
    return ahead * rows * columns, frames * rows * columns


def forward_micro_batch(
    stage: WanStage, module: Any, batch: MicroBatch, flow: FlowMatching, parallel: ParallelModel, seed: int
) -> tuple[Tensor, LossFunction]:
    """Run one stage on one micro-batch, and say how its output turns into a loss.

    Noise and timesteps are drawn on the CPU, where they are the same for every device and layout; each rank has what it
    needs, so the first stage and the last one agree without a message. The rest is computed on the device, whose
    elementwise operators round as the CPU's do.
    """
    device, segments = parallel.backend.device, segments_of(batch)
    parts = draw_parts(flow, segments, parallel.wan, seed, device)
    noisy, target = [segment["latents"] for segment in segments], torch.empty(0)
    if stage.first or stage.last:
        noisy, target = _noisy_and_target(stage, segments, flow, parallel, seed, parts)
    inputs = [
        _inputs(stage, parallel.wan.task, segment, latents, own, device)
        for segment, latents, own in zip(segments, noisy, parts, strict=True)
    ]
    output = module(PackedInputs(tuple(inputs)) if is_packed(batch) else inputs[0])

    def loss_function(velocity: Tensor) -> tuple[Tensor, Tensor]:
        return _loss(flow, parallel, segments, velocity, target, parts)

    return output, loss_function


def _inputs(
    stage: WanStage,
    task: Task,
    segment: FeatureBatch,
    latents: Tensor,
    parts: Sequence[Part],
    device: torch.device,
) -> ModelInputs:
    """Inputs of one stage; those after the first need the shapes of latents and text, and which features there are."""
    timestep, runs = timesteps_of_runs(parts)
    if not stage.first:
        return ModelInputs(latents, timestep, segment["text"], segment["features"], runs)
    features = {name: to_device(value, device) for name, value in computed(segment["features"], task).items()}
    return ModelInputs(latents, timestep, to_device(segment["text"], device), features, runs)


def _loss(
    flow: FlowMatching,
    parallel: ParallelModel,
    segments: Sequence[FeatureBatch],
    velocity: Tensor,
    target: Tensor,
    parts: Sequence[Sequence[Part]],
) -> tuple[Tensor, Tensor]:
    """This rank's part of the mean of the samples' losses, and of each of them; padding takes no part."""
    counts, ratio = [token_counts(segment, parallel.wan) for segment in segments], flow.config.motion_loss_ratio
    losses: list[Tensor] = []
    of_samples = [velocity.new_zeros(len(segment["sample"])) for segment in segments]
    start = 0
    for run in parallel.mesh.tokens.runs([sum(each) for each in counts]):
        elements = learned_elements(parts[run.sample], segments[run.sample]["latents"])
        begin, _ = counts[run.sample]
        share = 1.0 if ratio is None or not has_motion(segments[run.sample]) else 1.0 - ratio
        for part in parts[run.sample]:
            end = begin + part.tokens
            first, stop = (start + min(max(token - run.start, 0), run.real) for token in (begin, end))
            loss, own = flow.loss(velocity[:, first:stop], target[:, first:stop], part.weight, elements)
            losses.append(share * loss)
            of_samples[run.sample] += share * own.detach()
            begin = end
        start += run.places
    if ratio is not None:
        error = velocity.float() - target
        for index, motion in motion_losses(parallel.mesh, segments, error, counts, parts):
            losses.append(ratio * motion.mean())
            of_samples[index] += ratio * motion.detach()
    return torch.stack(losses).sum() / len(segments), joined(of_samples, 0)


def _noisy_and_target(
    stage: WanStage,
    segments: Sequence[FeatureBatch],
    flow: FlowMatching,
    parallel: ParallelModel,
    seed: int,
    parts: Sequence[Sequence[Part]],
) -> tuple[list[Tensor], Tensor]:
    """Noisy latents [B, C, F, H, W] of each on the first stage, this rank's tokens of the target on the last.

    What a stage does not need is left empty. Clean latents and noise live no longer than this call.
    """
    noisy, targets = [], []
    for segment, own in zip(segments, parts, strict=True):
        latents, target = _noisy_and_whole_target(stage, segment, flow, parallel, seed, own)
        noisy.append(latents)
        ahead, _ = token_counts(segment, parallel.wan)
        targets.append(F.pad(target, (0, 0, ahead, 0)) if ahead and stage.last else target)
    return noisy, parallel.mesh.tokens.take(targets, dim=1) if stage.last else targets[0]


def _noisy_and_whole_target(
    stage: WanStage,
    batch: FeatureBatch,
    flow: FlowMatching,
    parallel: ParallelModel,
    seed: int,
    parts: Sequence[Part],
) -> tuple[Tensor, Tensor]:
    """`_noisy_and_target` of samples of one shape, with all tokens of the target."""
    device = parallel.backend.device
    clean = to_device(batch["latents"], device).float()
    noise = batch.get("noise")  # readers draw it ahead
    if noise is None:
        noise = flow.draw_noise(seed, batch["sample"], batch["draw"], clean.shape[1:])
    noise = to_device(noise, device)
    latents = noisy_latents(flow, clean, noise, parts) if stage.first else batch["latents"]
    if not stage.last:
        return latents, torch.empty(0)
    return latents, patchify(flow.target(clean, noise), parallel.wan.patch_size)
