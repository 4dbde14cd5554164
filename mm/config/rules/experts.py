"""Rules about runs of two experts, and about the other one of two in rendered clips."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mm.config.run.training import TrainingRun
from mm.errors import Problem


def _band_is_the_boundary_s(run: TrainingRun) -> Iterator[Problem]:
    """CFG-310: what says a band of its own beside the boundary."""
    if run.experts is None:
        return
    words, boundary = run.origins, run.origins["experts.boundary"]
    for name in ("band_from", "band_below"):
        value = getattr(run.objective, name)
        if value is not None:
            given = words[f"objective.{name}"].with_value(value)
            found = f"{given} and {boundary.name} are both given, and two experts share all noise levels."
            yield Problem("CFG-310", found, "Remove one of them: a band is for a run of one expert.")


def _both_have_weights(run: TrainingRun) -> Iterator[Problem]:
    """CFG-311: weights of one expert alone."""
    experts, start, words = run.experts, run.checkpoint, run.origins
    if experts is None:
        return
    high, low = words["checkpoint.load"].name, words["experts.load"].name
    if (start.load is None) != (experts.load is None):
        missing, given = (low, high) if experts.load is None else (high, low)
        found = f"{given} is given without {missing}: one expert has weights to start from, and the other none."
        yield Problem("CFG-311", found, f"Give {high} the expert for much noise, and {low} the one for little.")
    base, other = words["experts.base"].name, words["adapters.base"].name
    if run.adapters is not None and experts.base is None:
        found = f"{base} is missing: LoRA of two experts needs the base of the one for little noise too."
        yield Problem("CFG-311", found, f"Give it beside {other}.")
    if run.adapters is None and experts.base is not None:
        yield Problem("CFG-311", f"{base} has no effect without LoRA.", f"Remove it, or give {low}.")


def _both_have_levels(run: TrainingRun) -> Iterator[Problem]:
    """CFG-312: a boundary beyond all noise levels that can be drawn."""
    if run.experts is None or run.objective.timestep_sampling != "grid":
        return
    levels, boundary = run.objective.levels(), run.experts.boundary
    if not min(levels) < boundary <= max(levels):
        word = run.origins["experts.boundary"].with_value(boundary)
        found = f"{word} leaves one expert without noise levels: those drawn are {min(levels):g} to {max(levels):g}."
        yield Problem("CFG-312", found, "Use 0.875 for Wan2.2's T2V-A14B, 0.9 for I2V-A14B.")


def _is_offered(run: TrainingRun) -> Iterator[Problem]:
    """CFG-313: what is not done for two experts."""
    if run.experts is None:
        return
    asked = {
        "checkpoint.in_background": (run.checkpoint.in_background, True, "the checkpoints of both are one state"),
        "checkpoint.format": (run.checkpoint.format == "torch", "torch", "it holds no optimizer, and no band"),
        "live": (run.live is not None, True, "its encoders share the device with both"),
    }
    for path, (given, value, why) in asked.items():
        if given:
            word = run.origins[path]
            named = word.name if path == "live" else word.with_value(value)
            found = f"{named} is not done with {run.origins['experts.boundary'].name}: {why}."
            yield Problem("CFG-313", found, "Remove one of them.")


def _other_expert_has_a_band(run: TrainingRun) -> Iterator[Problem]:
    """CFG-314: the other expert of a run that trains one, and says where its band ends."""
    if run.validation is None or run.validation.other_expert is None:
        return
    word, objective = run.origins["validation.other_expert"].name, run.objective
    low, high = (run.origins[f"objective.{name}"].name for name in ("band_from", "band_below"))
    if run.experts is not None:
        found = f"{word} has no effect with {run.origins['experts.boundary'].name}: clips ask both experts as they are."
        yield Problem("CFG-314", found, "Remove it.")
    elif (objective.band_from is None) == (objective.band_below is None):
        found = f"{word} needs a run of one expert, and neither {low} alone nor {high} alone says which."
        yield Problem("CFG-314", found, f"Give {low} for the expert for much noise, or {high} for the other.")


EXPERT_RULES: tuple[Callable[[TrainingRun], Iterator[Problem]], ...] = (
    _band_is_the_boundary_s,
    _both_have_weights,
    _both_have_levels,
    _is_offered,
    _other_expert_has_a_band,
)
