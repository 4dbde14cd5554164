"""Rules about the features of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.rules.sources import LISTINGS, clip_problems, list_problems
from mm.config.run.data import FeatureSet
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun
from mm.config.tasks.task import Task
from mm.config.unread import is_given
from mm.errors import Problem


def _features_have_a_clip(run: TrainingRun) -> Iterator[Problem]:
    """CFG-050 and CFG-051 of the features that are trained on."""
    if is_given(clip := run.data.features.clip):
        yield from clip_problems(clip, run.origins, "data.features.clip", run.wan.task)


def _features_are_listed(run: TrainingRun) -> Iterator[Problem]:
    """CFG-053 of the features that are trained on."""
    features = run.data.features
    yield from list_problems(features.path, features.folder, run.origins, "data.features", endings=LISTINGS)


def _held_out_features_can_be(run: TrainingRun) -> Iterator[Problem]:
    """CFG-050, CFG-051 and CFG-053 of the features that are held out."""
    if run.evaluation is not None:
        yield from feature_problems(run.evaluation.features, run.origins, "evaluation.features", run.wan.task)


def feature_problems(features: FeatureSet, words: Origins, path: str, task: Task) -> Iterator[Problem]:
    """Problems of one set.

    Args:
        features: the set. words: of the run. path: of the set in it. task: of the model.
    """
    if is_given(features.clip):
        yield from clip_problems(features.clip, words, f"{path}.clip", task)
    yield from list_problems(features.path, features.folder, words, path, endings=LISTINGS)


def _shares_end_after_they_begin(run: TrainingRun) -> Iterator[Problem]:
    """CFG-203: a share that no step or no epoch has."""
    for number, share in enumerate(run.data.mixture.shares):
        bounds = (("step", share.begin_step, share.end_step), ("epoch", share.begin_epoch, share.end_epoch))
        for unit, begin, end in bounds:
            if end is not None and end <= begin:
                word = run.origins["data.mixture.shares"]
                found = f"{word.file}: {word.name} has {share.folder} (number {number + 1}) end with {unit} {end}"
                more = f", and begin after {unit} {begin}."
                yield Problem("CFG-203", found + more, f"Raise its end_{unit}, or remove the share.")


def _what_is_dropped_is_there(run: TrainingRun) -> Iterator[Problem]:
    """CFG-279: a condition that the model's task does not have."""
    task = run.model.shape.task
    for name in run.data.condition_dropout.rates.keys() - task.dropped:
        word = run.origins[f"data.condition_dropout.{name}"]
        has = " and ".join(sorted(task.dropped)) or "nothing beside the caption"
        found = f"{word.place()} has no effect: of {task.name} {has} can be dropped."
        caption = run.origins["data.caption_dropout"].name
        yield Problem("CFG-279", found, f"Remove it; captions are dropped by {caption}.")


FEATURE_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    _features_have_a_clip,
    _features_are_listed,
    _held_out_features_can_be,
    _shares_end_after_they_begin,
    _what_is_dropped_is_there,
)
