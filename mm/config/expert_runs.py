"""Runs of two experts: each is an ordinary run of its own, with its band of noise levels, its weights and its folder.

What the steps share (samples, their order, rates, layout) is the run's own and equal in both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mm.config.run.experts import HIGH, LOW, expert_folders
from mm.config.run.origins import Origins
from mm.config.run.training import TrainingRun


def expert_runs(run: TrainingRun) -> tuple[TrainingRun, TrainingRun]:
    """The run of the expert for much noise and that of the one for little.

    Args:
        run: with a section `experts`, accepted by the rules.
    """
    experts, adapters, save = run.experts, run.adapters, run.checkpoint.save
    if experts is None:
        raise ValueError("a run of one transformer has no experts")
    folders = (None, None) if save is None else tuple(map(str, expert_folders(save)))
    high: dict[str, Any] = {"objective.band_from": experts.boundary, "checkpoint.save": folders[0]}
    low: dict[str, Any] = {
        "objective.band_below": experts.boundary,
        "checkpoint.save": folders[1],
        "checkpoint.load": experts.load,
    }
    if adapters is not None:
        low["adapters.base"] = experts.base
    return _changed(run, high, low=False), _changed(run, low, low=True)


def expert_name(objective: Any) -> str:
    """Name of the expert of an objective: diffusers' name of its folder."""
    return HIGH if objective.band_from is not None else LOW


def _changed(run: TrainingRun, values: dict[str, Any], *, low: bool) -> TrainingRun:
    changed = run.changed(values)
    return changed.model_copy(update={"origins": _origins(run.origins, low=low)})


def _origins(words: Origins, *, low: bool) -> Origins:
    """The user's words for the values of one expert."""
    own = dict.fromkeys(("objective.band_from", "objective.band_below"), words["experts.boundary"])
    if low:
        own |= {"checkpoint.load": words["experts.load"], "adapters.base": words["experts.base"]}
    return replace(words, words={**words.words, **own})
