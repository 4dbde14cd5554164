"""The loss on held-out features, comparable between steps and runs: the same noise at the same ten timesteps each time.

A training loss depends on the timesteps that a step happens to draw, and varies more between them than a model improves
in hours. Here every sample is asked at the same ten, with the same noise, and nothing is weighted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mm.checkpoint.comm import Comm
from mm.config.diffusion import DiffusionConfig
from mm.data.dataset import FeatureDataset
from mm.data.loader import FeatureBatch, feature_batches
from mm.data.sampler import BatchPlan
from mm.diffusion.flow import FlowMatching
from mm.parallel.apply import ParallelModel
from mm.rng import generator
from mm.train.callbacks.base import Every, ModelCheck
from mm.train.models import Models
from mm.train.records import EVALUATION_FILE, Record, StepEvaluation, read_evaluations
from mm.wan.conditions.first_frame import learned_frames, with_given_frame
from mm.wan.inputs import ModelInputs

if TYPE_CHECKING:  # the samplers' library
    from mm.generate.pipeline import Velocity

TIMESTEPS = tuple(range(50, 1000, 100))
"""The middles of ten equal parts of the noise levels, times 1000."""

_SEED = 0  # not the run's: losses of runs with different seeds are compared


class Evaluation(ModelCheck):
    """The loss on `--eval-data` every `--eval-interval` steps and after the last."""

    def __init__(self, dataset: FeatureDataset, comm: Comm, interval: int, folder: Path | None) -> None:
        """Evaluate now and then.

        Args:
            dataset: held-out features. comm: all ranks. interval: in steps.
            folder: of the run, whose evaluation.jsonl says what was done; None where it has none.
        """
        self.every = Every(interval, at_end=True)
        self._dataset, self._comm, self._folder = dataset, comm, folder

    def look(self, models: Models, step: int) -> Sequence[Record]:
        """Evaluate; raises what `evaluate` raises."""
        loss_at, num_samples = evaluate(models.first.parallel, models.velocity(), self._dataset, self._comm)
        return [StepEvaluation(step, statistics.fmean(loss_at.values()), loss_at, num_samples)]

    def is_missing(self, step: int) -> bool:
        """Notice that evaluation.jsonl has no line of a step.

        Raises:
            CheckpointError: CKPT-070 where it is damaged.
        """
        file = None if self._folder is None else self._folder / EVALUATION_FILE
        return file is None or not file.exists() or all(row.step != step for row in read_evaluations(file))


def evaluate(
    parallel: ParallelModel, velocity: Velocity, dataset: FeatureDataset, comm: Comm
) -> tuple[dict[int, float], int]:
    """The loss of a model on all samples of a data set, the same on every rank; samples are spread over the replicas.

    Args:
        parallel: the model, in training or not, for its shape and place. velocity: of it, or of both experts.
        dataset: held-out features.
        comm: all ranks, each of which calls this.

    Returns:
        Mean squared error of the velocity, unweighted, over samples at each of `TIMESTEPS`; and how many samples.

    Raises:
        DataError: what reading a sample raises.
    """
    losses = {
        batch["sample"][0]: [_loss(parallel, velocity, batch, timestep) for timestep in TIMESTEPS]
        for batch in _samples_of_replica(parallel, dataset)
    }
    everyone = {sample: values for part in comm.all_gather_object(losses) for sample, values in part.items()}
    columns = zip(*(everyone[sample] for sample in sorted(everyone)), strict=True)  # one order in every layout
    return dict(zip(TIMESTEPS, map(statistics.fmean, columns), strict=True)), len(everyone)


def _samples_of_replica(parallel: ParallelModel, dataset: FeatureDataset) -> Iterator[FeatureBatch]:
    """Equally many samples on every replica, as gathering weights takes all of them; what is left over comes twice."""
    dp_size = parallel.mesh.layout.dp_size
    plan = BatchPlan(dp_size, 1, parallel.mesh.dp_rank, dp_size)
    batches = feature_batches(dataset, plan, text_len=parallel.wan.text_len, seed=_SEED, shuffle=False)
    for _ in range(-(-len(dataset) // dp_size)):
        yield next(batches)


def _loss(parallel: ParallelModel, model: Velocity, batch: FeatureBatch, timestep: int) -> float:
    """Mean squared error of the velocity of one sample; where its task has it, the first latent frame is given."""
    device, flow = parallel.backend.device, FlowMatching(DiffusionConfig())
    clean = batch["latents"].float()
    random = generator(_SEED, "evaluation_noise", batch["sample"][0], timestep)
    noise = torch.randn(clean.shape, generator=random)
    noisy = flow.noisy(clean, noise, torch.tensor([timestep / 1000]))
    inputs = ModelInputs(noisy, torch.tensor([float(timestep)]), batch["text"], batch["features"])
    learned = torch.ones(clean.shape[2], dtype=torch.bool)
    if parallel.wan.first_frame_share and clean.shape[2] > 1:
        inputs, learned = (
            with_given_frame(inputs, clean[:, :, :1], parallel.wan.patch_size),
            learned_frames(len(learned)),
        )
    velocity = model(inputs.each(lambda value: value.to(device)))
    return float((velocity.float().cpu() - flow.target(clean, noise))[:, :, learned].square().mean())
