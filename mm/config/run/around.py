"""The sections about what happens around the steps: their number, evaluation, supervision, logging."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.run.data import FeatureSet
from mm.config.trainable import TrainableWord


class TrainingSection(Section):
    """Length of the training, its chance, and its device.

    Attributes:
        steps: of the whole training, those before a resume included.
        seed: of noise, timesteps, sample order and caption dropout.
        deterministic: refuse kernels whose result depends on timing.
        device: kind of device; None takes the best there is.
        trainable: words for the parameters that are trained (`mm.config.trainable`), beside which the others are
            frozen; with adapters: beside these. None takes all parameters, or with adapters none.
    """

    steps: int = Field(ge=1)
    seed: int = Field(1234, ge=0)
    deterministic: bool = False
    device: Literal["cpu", "cuda", "npu"] | None = None
    trainable: tuple[TrainableWord, ...] | None = Field(None, min_length=1)


class EvaluationSection(Section):
    """Losses on held-out features: every how many steps, on which."""

    interval: int = Field(ge=1)
    features: FeatureSet


class ValidationSection(Section):
    """Clips rendered with the model as it is.

    Attributes:
        interval: steps between renderings. prompts: text file, one prompt a line.
        images: text file, one image a line, or first and last.
        config: inference_model.json, or run.yaml of a generation: encoders, size, sampler.
        other_expert: weights of the other one of two experts, which take over beyond the band that is trained.
    """

    interval: int = Field(ge=1)
    prompts: str = Field(min_length=1)
    images: str | None = Field(None, min_length=1)
    config: str = Field(min_length=1)
    other_expert: str | None = Field(None, min_length=1)


def validation_folder(save: str) -> Path:
    """Folder of a run's clips."""
    return Path(save) / "validation"


class SupervisionSection(Section):
    """Supervision of the processes.

    Attributes:
        timeout_minutes: how long a collective may wait.
        hang_timeout: seconds without progress until the run names the suspect rank and ends; None: 120 or ten steps.
        straggler_interval: steps between comparisons of the ranks' own time.
        replica_hash_interval: steps between comparisons of the weights that replicas hold, bit for bit.
    """

    timeout_minutes: int = Field(30, ge=1)
    hang_timeout: float | None = Field(None, gt=0)
    straggler_interval: int | None = Field(None, ge=1)
    replica_hash_interval: int | None = Field(None, ge=1)


class LoggingSection(Section):
    """Logging.

    Attributes:
        interval: steps between console lines. norms_interval: steps between norms of each parameter and its gradient.
        tensorboard: a folder other than SAVE/tensorboard. progress_bar: show one.
    """

    interval: int = Field(1, ge=1)
    norms_interval: int | None = Field(None, ge=1)
    tensorboard: str | None = None
    progress_bar: bool = True
