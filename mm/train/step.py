"""One optimizer step: draw noise and timesteps, run the schedule over the micro-batches, apply the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mm.data.loader import FeatureBatch
from mm.diffusion.flow import FlowMatching
from mm.errors import NumericsError
from mm.parallel.apply import ParallelModel, forward_backward
from mm.parallel.optimizer import Optimizer


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: weighted loss, mean over the global batch. grad_norm: before clipping. lr: the rate that was used.
        tokens: video tokens of this replica's samples, after patching.
    """

    loss: float
    grad_norm: float
    lr: float
    tokens: int


def train_step(
    parallel: ParallelModel,
    optimizer: Optimizer,
    flow: FlowMatching,
    batches: Iterator[FeatureBatch],
    *,
    num_microbatches: int,
    samples: int,
    seed: int,
) -> StepResult:
    """Take one step on the next `num_microbatches` of `batches`.

    Args:
        parallel: the model on the mesh.
        optimizer: its optimizer.
        flow: noise schedule and loss.
        batches: this replica's micro-batches, in order.
        num_microbatches: gradient accumulation of this replica.
        samples: the global batch, by which the learning-rate schedule advances.
        seed: of noise and timesteps.

    Raises:
        NumericsError: NUM-001 for a loss, NUM-002 for a gradient that is not finite; no weight has changed then.
    """
    drawn: list[FeatureBatch] = []

    def forward_step(module: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        drawn.append(batch)
        return _forward(module, batch, flow, parallel.backend.device, seed)

    losses = forward_backward(parallel, forward_step, num_microbatches)
    local = sum(float(loss) for loss in losses) / num_microbatches
    (loss,) = parallel.mesh.average_over_data([local])
    if not math.isfinite(loss):
        identities = ", ".join(sample for batch in drawn for sample in batch["sample"])
        raise NumericsError(
            "NUM-001",
            f"The loss is {loss}; no weight was changed. Samples of this rank's step: {identities}.",
            "Check these features (NaN, dtype), lower --lr, or resume from the checkpoint before.",
        )
    lr = optimizer.learning_rate
    grad_norm = optimizer.step(samples)
    patch = math.prod(parallel.chunks[0].module.model.config.patch_size)
    tokens = sum(math.prod(batch["latents"].shape) // (batch["latents"].shape[1] * patch) for batch in drawn)
    return StepResult(loss, grad_norm, lr, tokens)


def _forward(
    module: Any, batch: FeatureBatch, flow: FlowMatching, device: torch.device, seed: int
) -> tuple[torch.Tensor, Any]:
    """Noise the latents, predict the velocity, and say how to turn it into a loss.

    Noise and timesteps are drawn on the CPU, where they are the same for every device and layout, and moved.
    """
    latents = batch["latents"].float()
    sigma, timestep, weight = flow.draw_timesteps(seed, batch["sample"], batch["draw"])
    noise = flow.draw_noise(seed, batch["sample"], batch["draw"], latents.shape[1:])
    target = flow.target(latents, noise).to(device, non_blocking=True)
    prediction = module(
        flow.noisy(latents, noise, sigma).to(device, non_blocking=True),
        timestep.to(device, non_blocking=True),
        batch["text"].to(device, non_blocking=True),
    )

    def loss_function(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = flow.loss(output, target, weight)
        return loss, loss.detach().clone()  # a copy: the schedule divides the loss in place

    return prediction, loss_function
