"""Rules about the timesteps of a model: one a sample, or one for each token."""

from __future__ import annotations

from collections.abc import Iterator

from mm.config.model import TASK_FIELD
from mm.config.run.generation import GenerationRun
from mm.config.run.training import TrainingRun
from mm.config.tasks.registry import TASKS, named
from mm.errors import Problem

_FORCED = "model.shape.force_2_1_time_embedding"


def timesteps_are_of_the_model(run: TrainingRun | GenerationRun) -> Iterator[Problem]:
    """CFG-305: a task with one timestep a sample, and latents of models that have one for each token."""
    wan, words = run.wan, run.origins
    others = [task for task in TASKS.values() if task.latent_channels == wan.out_dim]
    if wan.task.latent_channels is None and others:
        said, channels = words[f"model.shape.{TASK_FIELD}"], words["model.shape.out_dim"]
        found = (
            f"{said.with_value(wan.task.name)} has one timestep a sample, as Wan2.1's time embedding, and "
            f"{channels.with_value(wan.out_dim)} is of models that have one for each token."
        )
        forced = words[_FORCED].with_value(True)
        how = f"Set {said.name} to {named(others)}; beside {forced} those have one timestep a sample, too."
        yield Problem("CFG-305", found, how)
