"""The loss on held-out features, comparable between steps and runs: the same noise at the same ten timesteps each time.

A training loss depends on the timesteps that a step happens to draw, and varies more between them than a model improves
in hours. Here every sample is asked at the same ten, with the same noise, and nothing is weighted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mm.checkpoint.comm import Comm
from mm.config.diffusion import DiffusionConfig
from mm.data.dataset import FeatureDataset
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.sampler import BatchPlan
from mm.diffusion.flow import FlowMatching
from mm.parallel.apply import ParallelModel
from mm.parallel.velocity import ParallelVelocity
from mm.rng import generator
from mm.wan.inputs import ModelInputs

TIMESTEPS = tuple(range(50, 1000, 100))
"""The middles of ten equal parts of the noise levels, times 1000."""

_SEED = 0  # not the run's: losses of runs with different seeds are compared


@dataclass(frozen=True)
class Evaluation:
    """Mean squared error of the velocity, unweighted.

    Attributes:
        loss: mean over samples and timesteps. loss_at: mean over samples at each of `TIMESTEPS`.
        num_samples: held out.
    """

    loss: float
    loss_at: dict[int, float]
    num_samples: int


def evaluate(parallel: ParallelModel, dataset: FeatureDataset, comm: Comm) -> Evaluation:
    """The loss of a model on all samples of a data set, the same on every rank; samples are spread over the replicas.

    Args:
        parallel: the model, in training or not.
        dataset: held-out features.
        comm: all ranks, each of which calls this.

    Raises:
        DataError: what reading a sample raises.
    """
    losses = {
        batch["sample"][0]: [_loss(parallel, batch, timestep) for timestep in TIMESTEPS]
        for batch in _samples_of_replica(parallel, dataset)
    }
    everyone = {sample: values for part in comm.all_gather_object(losses) for sample, values in part.items()}
    columns = zip(*(everyone[sample] for sample in sorted(everyone)), strict=True)  # one order in every layout
    loss_at = dict(zip(TIMESTEPS, map(statistics.fmean, columns), strict=True))
    return Evaluation(statistics.fmean(loss_at.values()), loss_at, len(everyone))


def _samples_of_replica(parallel: ParallelModel, dataset: FeatureDataset) -> Iterator[FeatureBatch]:
    """As many samples on every replica, as gathering weights takes all of them; what is left over comes twice."""
    dp_size = parallel.mesh.layout.dp_size
    plan = BatchPlan(dp_size, 1, parallel.mesh.dp_rank, dp_size)
    batches = feature_batches(dataset, plan, text_len=parallel.wan.text_len, seed=_SEED, shuffle=False)
    for _ in range(-(-len(dataset) // dp_size)):
        yield next(batches)


def _loss(parallel: ParallelModel, batch: FeatureBatch, timestep: int) -> float:
    """Mean squared error of the velocity of one sample."""
    device, flow = parallel.backend.device, FlowMatching(DiffusionConfig())
    clean = batch["latents"].float()
    random = generator(_SEED, "evaluation_noise", batch["sample"][0], timestep)
    noise = torch.randn(clean.shape, generator=random)
    noisy = flow.noisy(clean, noise, torch.tensor([timestep / 1000]))
    inputs = ModelInputs(noisy, torch.tensor([float(timestep)]), batch["text"], batch["features"])
    velocity = ParallelVelocity(parallel)(inputs.each(lambda value: value.to(device)))
    return float((velocity.float().cpu() - flow.target(clean, noise)).square().mean())
