"""One optimizer step: draw noise and timesteps, run the schedule over the micro-batches, apply the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.data.loader import FeatureBatch
from mm.device.copies import to_device
from mm.diffusion.flow import FlowMatching
from mm.errors import NumericsError
from mm.optim.optimizer import Optimizer
from mm.optim.step_statistics import StepStatistics, gather_statistics
from mm.parallel.apply import ParallelModel
from mm.parallel.schedule import LossFunction, forward_backward
from mm.parallel.stage import WanStage
from mm.train.memory_breakdown import Phase
from mm.wan.inputs import ModelInputs
from mm.wan.patches import patchify, token_grid

PatchSize = tuple[int, int, int]


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Attributes:
        statistics: losses and gradients. updated: whether they were applied.
        lr: the rate that was used. tokens: video tokens of this replica's samples, after patching.
    """

    statistics: StepStatistics
    updated: bool
    lr: float
    tokens: int


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
    batches: Sequence[FeatureBatch],
    *,
    samples: int,
    seed: int,
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
        samples: the global batch, by which the learning-rate schedule advances.
        seed: of noise and timesteps.
        during: makes what to enter for each phase of the step.
        on_nonfinite: called on every rank where a loss or gradient is not finite, before any weight has changed; the
            update is left out if it returns.
        asked_to_stop: whether this process was; asked when the gradients are there.

    Raises:
        NumericsError: what `on_nonfinite` raises.
    """
    with during("forward and backward"):
        losses = compute_gradients(parallel, flow, batches, seed)
    lr = optimizer.learning_rate
    with during("reducing gradients"):
        optimizer.reduce_gradients()
        statistics = gather_statistics(parallel, optimizer, losses, asked_to_stop())
    if statistics.is_finite:
        with during("the optimizer's update"):
            optimizer.update(statistics.grad_norm, samples)
    else:
        on_nonfinite(statistics)
        optimizer.skip(samples)
    patch_size = parallel.wan.patch_size
    tokens = sum(len(batch["sample"]) * num_tokens(batch["latents"].shape, patch_size) for batch in batches)
    return StepResult(statistics, statistics.is_finite, lr, tokens)


def compute_gradients(
    parallel: ParallelModel, flow: FlowMatching, batches: Sequence[FeatureBatch], seed: int
) -> Tensor:
    """Forward and backward of one step; the gradients stay where `Optimizer.reduce_gradients` finds them.

    Returns:
        This rank's part of the weighted losses of its replica's samples, [micro-batches, samples] fp32 on the device:
        of its own tokens on the last pipeline stage, zeros elsewhere and where another rank has the same.
    """
    patch_size = parallel.wan.patch_size

    def forward_step(stage: WanStage, module: Any, batch: FeatureBatch) -> tuple[Tensor, LossFunction]:
        return forward_micro_batch(stage, module, batch, flow, parallel, seed)

    def tokens_of(batch: FeatureBatch) -> tuple[int, int, int]:
        return len(batch["sample"]), num_tokens(batch["latents"].shape, patch_size), batch["text"].shape[1]

    losses = forward_backward(parallel, forward_step, batches, tokens_of)
    mesh = parallel.mesh
    if parallel.last and (mesh.layout.sequence_parallel or mesh.tp_rank == 0):
        return torch.stack(losses).float()
    return torch.zeros(len(batches), len(batches[0]["sample"]), device=parallel.backend.device)


def num_tokens(latents: Sequence[int], patch_size: PatchSize) -> int:
    """Video tokens of one sample of latents of shape [B, C, F, H, W]."""
    frames, height, width = latents[2:]
    return math.prod(token_grid((frames, height, width), patch_size))


def forward_micro_batch(
    stage: WanStage, module: Any, batch: FeatureBatch, flow: FlowMatching, parallel: ParallelModel, seed: int
) -> tuple[Tensor, LossFunction]:
    """Run one stage on one micro-batch, and say how its output turns into a loss.

    Noise and timesteps are drawn on the CPU, where they are the same for every device and layout; each rank has what it
    needs, so the first stage and the last one agree without a message. The rest is computed on the device, whose
    elementwise operators round as the CPU's do.
    """
    device, patch_size, share = parallel.backend.device, parallel.wan.patch_size, parallel.mesh.tokens
    clean_shape = batch["latents"].shape
    drawn = torch.stack(flow.draw_timesteps(seed, batch["sample"], batch["draw"]))
    sigma, timestep, weight = to_device(drawn, device)
    latents, target, text = batch["latents"], torch.empty(0), batch["text"]
    features: dict[str, Tensor] = {}
    if stage.first or stage.last:
        latents, target = _noisy_and_target(stage, batch, flow, parallel, seed, sigma)
    if stage.first:
        text = to_device(text, device)
        features = {name: to_device(value, device) for name, value in batch["features"].items()}
    output = module(ModelInputs(latents, timestep, text, features))

    def loss_function(velocity: Tensor) -> tuple[Tensor, Tensor]:
        real = share.real(num_tokens(clean_shape, patch_size))  # padding takes no part
        elements = math.prod(clean_shape[1:])
        loss, of_samples = flow.loss(velocity[:, :real], target[:, :real], weight, elements)
        return loss, of_samples.detach()

    return output, loss_function


def _noisy_and_target(
    stage: WanStage, batch: FeatureBatch, flow: FlowMatching, parallel: ParallelModel, seed: int, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents [B, C, F, H, W] on the first stage, this rank's tokens of the target on the last, on the device.

    What a stage does not need is left empty. Clean latents and noise live no longer than this call.
    """
    device = parallel.backend.device
    clean = to_device(batch["latents"], device).float()
    noise = batch.get("noise")  # readers draw it ahead
    if noise is None:
        noise = flow.draw_noise(seed, batch["sample"], batch["draw"], clean.shape[1:])
    noise = to_device(noise, device)
    latents = flow.noisy(clean, noise, sigma) if stage.first else batch["latents"]
    if not stage.last:
        return latents, torch.empty(0)
    tokens = patchify(flow.target(clean, noise), parallel.wan.patch_size)
    return latents, parallel.mesh.tokens.take(tokens, dim=1)
