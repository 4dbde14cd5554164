"""Comparison of a run with the checkpoint that it would go on from, told as its start would tell it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mm.checkpoint.comm import SingleProcess
from mm.config.expert_runs import expert_runs
from mm.config.run.experts import expert_folders
from mm.config.run.training import TrainingRun
from mm.config.step import DataSettings
from mm.data.dataset import FeatureDataset, open_features
from mm.doctor.preflight import Finding
from mm.optim.algorithms.make import ALGORITHMS
from mm.train.adapters import open_base
from mm.train.build import settings_with, starting_point
from mm.train.resuming import Resuming
from mm.train.run import expected_model
from mm.train.state import require_same_run
from mm.train.trained_parts import TrainedModel


def resume(sections: TrainingRun, dataset: FeatureDataset, dp_size: int, model: TrainedModel) -> list[Finding]:
    """Compare a run with the checkpoints that it would go on from; nothing where it starts anew.

    Args:
        sections, dataset, dp_size, model: the run, of one model or of two experts.

    Raises:
        ConfigError, CheckpointError, DataError, ResumeError: what the start would raise.
    """
    if sections.experts is None:
        return _resume(sections, dataset, dp_size, model, ())
    folders = () if sections.checkpoint.save is None else expert_folders(sections.checkpoint.save)
    found = []
    for one in expert_runs(sections):
        beside = [folder for folder in folders if str(folder) != one.checkpoint.save]
        found += _resume(one, dataset, dp_size, model, beside)
    return found


def _resume(
    sections: TrainingRun, dataset: FeatureDataset, dp_size: int, model: TrainedModel, beside: Sequence[Path]
) -> list[Finding]:
    comm, start = SingleProcess(), sections.checkpoint
    found, goes_on = starting_point(sections, comm, "size", beside)
    if found is None or not goes_on:
        return []
    held_out = None
    if sections.evaluation is not None:
        held_out = _identified(open_features(sections.evaluation.features, sections.wan))
    steps = settings_with(sections, dataset, dp_size, _identified(dataset), held_out)
    base = sections.adapters.base if sections.adapters is not None else None
    adapters = None
    if model.lora is not None and base is not None:
        parts = () if model.parts is None else model.parts.shapes
        adapters = open_base(model.lora, Path(base), expected_model(sections), comm, parts=parts).record
    require_same_run(
        found,
        expected_model(sections),
        sections.training.seed,
        resuming=Resuming(steps, sections, dp_size, reports=True),
        algorithm=ALGORITHMS[sections.optimizer.name] if start.load_optimizer else None,
        with_average=start.load_average,
        any_seed=not start.same_seed,
        adapters=adapters,
    )
    return [Finding("resume", "ok", f"goes on from {found.path.name} with the same model, steps and features")]


def _identified(dataset: FeatureDataset) -> DataSettings:
    return DataSettings(num_samples=len(dataset), identity=dataset.identity())
