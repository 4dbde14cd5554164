"""Rules about the arguments of `generate_videos`, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mm.api.arguments import column_problems
from mm.config.data import TEMPORAL_STRIDE
from mm.config.rules.generation import size_problems
from mm.config.rules.sampling import tea_cache_problems, window_problems
from mm.config.run.listed import LISTS, Listed, Shown, begins_as, lists_of
from mm.config.tasks.task import ListName, Source, Task
from mm.errors import Problem
from mm.generate.sampling import ClipPlan
from mm.generate.tea_cache import COEFFICIENTS


@dataclass(frozen=True)
class Asked:
    """Arguments of a generation, as they were given.

    Attributes:
        prompts: one for each video. lists: what goes with them, by the list's name, for each video none, one or more.
        columns: the same of each task's number, by name.
        strength: with videos. batch_size: prompts in one forward.
        text_only: a model that sees frames is shown none. settings: features that are set, by name.
        noise: of each video, where it is not the seed's.
    """

    prompts: tuple[str, ...]
    lists: Mapping[ListName, tuple[tuple[Any, ...], ...]]
    columns: Mapping[str, Sequence[float]]
    strength: float | None
    batch_size: int
    text_only: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)
    noise: tuple[Tensor, ...] | None = None

    def noise_of(self, index: int) -> Tensor | None:
        """Noise that was given for a video."""
        return None if self.noise is None else self.noise[index]

    @property
    def shown(self) -> Shown:
        """Way in which a model with given frames is told them."""
        return Shown(masked="masks" in self.lists, nothing=self.text_only)


def generation_problems(asked: Asked, plan: ClipPlan, task: Task) -> Iterator[Problem]:
    """CFG-060, CFG-061, CFG-063, CFG-120, CFG-121, CFG-123, CFG-200, CFG-280 and CFG-321 to CFG-323.

    Args:
        asked: what. plan: how. task: whose frames are given.
    """
    yield from size_problems(plan.size, plan.wan.patch_size, plan.wan.task, "size")
    yield from _number_problems(asked, plan)
    yield from _sampling_problems(plan)
    yield from _length_problems(asked)
    yield from _noise_problems(asked, plan)
    yield from _list_problems(asked, plan, task)
    yield from _setting_problems(asked, plan)
    yield from _video_problems(asked, plan, task)
    for index in range(len(asked.prompts)):
        of_prompt = {name: numbers[index] for name, numbers in asked.columns.items() if index < len(numbers)}
        yield from column_problems(plan.wan.task, of_prompt, f"Prompt {index}")


def _number_problems(asked: Asked, plan: ClipPlan) -> Iterator[Problem]:
    settings = plan.settings
    least = {"steps": (settings.num_steps, 1), "batch_size": (asked.batch_size, 1), "seed": (plan.seed, 0)}
    for name, (value, lowest) in least.items():
        if value < lowest:
            yield Problem("CFG-200", f"{name} is {value}.", f"Give {lowest} or more.")
    if not settings.shift > 0:
        yield Problem("CFG-200", f"shift is {settings.shift}.", "Give a number above 0.")
    for scale in (settings.guidance_scale, settings.low_guidance_scale):
        if scale is not None and not scale >= 0:
            yield Problem("CFG-200", f"guidance_scale is {scale}.", "Give 0 or more.")
    if settings.batched_guidance and not settings.guides:
        found = "batched_guidance has no effect with guidance_scale 1."
        yield Problem("CFG-063", found, "Leave it out, or choose another guidance_scale.")


def _sampling_problems(plan: ClipPlan) -> Iterator[Problem]:
    """CFG-200 for a model that TeaCache does not know, CFG-321 to CFG-323."""
    settings, options = plan.settings, plan.settings.options
    if options.tea_cache is not None:
        threshold, model = options.tea_cache
        if model not in COEFFICIENTS:
            found = f"tea_cache names {model!r}."
            yield Problem("CFG-200", found, f"Give one of {', '.join(COEFFICIENTS)}.")
        share = 1.0 if options.strength_steps == "all" else settings.strength
        yield from tea_cache_problems(threshold, int(settings.num_steps * share), "tea_cache")
    if options.windows is not None:
        yield from window_problems(*options.windows, plan.size[0], "windows")


def _length_problems(asked: Asked) -> Iterator[Problem]:
    lists: dict[str, Sequence[Any]] = dict((*asked.lists.items(), *asked.columns.items()))
    for name, given in lists.items():
        if len(given) != len(asked.prompts):
            found = f"There are {len(asked.prompts)} prompts and {len(given)} of {name}."
            yield Problem("CFG-200", found, "Give one for each prompt, in the same order.")


def _noise_problems(asked: Asked, plan: ClipPlan) -> Iterator[Problem]:
    noise = asked.noise or ()
    if noise and len(noise) != len(asked.prompts):
        found = f"There are {len(asked.prompts)} prompts and {len(noise)} of noise."
        yield Problem("CFG-200", found, "Give one for each prompt, in the same order.")
        return
    before_the_clip = {media.listed for media in plan.wan.task.media if media.in_front}
    for index, given in enumerate(noise):
        in_front = sum(len(asked.lists[name][index]) for name in before_the_clip & asked.lists.keys())
        expected = plan.latent_shape(in_front)
        if tuple(given.shape) != expected:
            found = f"The noise of prompt {index} is {list(given.shape)}, expected {list(expected)}."
            yield Problem("CFG-200", found, "Draw it in this shape.")


def _list_problems(asked: Asked, plan: ClipPlan, task: Task) -> Iterator[Problem]:
    """CFG-120, CFG-123, CFG-280 and CFG-306 for what the model's task takes of each list."""
    ways = [name for name in ("images", "masks") if name in asked.lists] + ["text_only"] * asked.text_only
    if plan.wan.task.with_mask and len(ways) > 1:
        found = f"{' and '.join(ways)} say each what the model sees of its clip."
        yield Problem("CFG-280", found, "Give one of them.")
        return
    if plan.wan.force_2_1_time_embedding and "images" in asked.lists:
        found = "With force_2_1_time_embedding nothing tells the model of the frames that images= gives."
        yield Problem("CFG-306", found, "Leave images= out.")
    title, takes = plan.wan.task.title, lists_of(task, asked.shown)
    for name in LISTS:
        listed, given = takes.get(name), asked.lists.get(name)
        if listed is None:
            if given is not None:
                yield Problem("CFG-120", f"{title} models take no {name}.", f"Leave {name}= out.")
        elif given is not None or listed.needed:
            for index, of_prompt in enumerate(given or [()] * len(asked.prompts)):
                if not _as_many(len(of_prompt), listed):
                    what = f"{title} models take {_in_words(listed)}"
                    found = f"Prompt {index} has {len(of_prompt)} {name}; {what}."
                    yield Problem("CFG-120", found, f"Correct {name}=.")
    if len(task.frames) > 1 and plan.size[0] < TEMPORAL_STRIDE + 1:
        found = f"A clip of {plan.size[0]} frames has no first and last one."
        yield Problem("CFG-123", found, f"Use {TEMPORAL_STRIDE + 1} frames or more.")


def _as_many(count: int, listed: Listed) -> bool:
    return listed.fewest <= count and (listed.most is None or count <= listed.most)


def _in_words(listed: Listed) -> str:
    """`1`, `0 to 1` or `any number`."""
    if listed.most is None:
        return "any number"
    return f"{listed.most}" if listed.fewest == listed.most else f"{listed.fewest} to {listed.most}"


def _setting_problems(asked: Asked, plan: ClipPlan) -> Iterator[Problem]:
    """CFG-120 for settings that the model's task does not have."""
    task = plan.wan.task
    for name in sorted(asked.settings.keys() - {feature.name for feature in task.made_by(Source.SETTING)}):
        yield Problem("CFG-120", f"{task.title} models take no {name}.", f"Leave {name}= out.")
    if asked.text_only and not task.with_mask:
        yield Problem("CFG-120", f"{task.title} models take no text_only.", "Leave text_only= out.")


def _video_problems(asked: Asked, plan: ClipPlan, task: Task) -> Iterator[Problem]:
    """CFG-121: a strength belongs to videos that clips begin as, not to those that the model sees."""
    if plan.settings.options.strength_steps == "all" and asked.strength is None:
        yield Problem("CFG-121", "strength_steps has no effect without strength.", "Leave it out, or give strength=.")
    begins = begins_as(task, asked.shown)
    if begins not in asked.lists:
        if asked.strength is not None:
            found = f"strength has no effect without {begins}, which clips begin as."
            yield Problem("CFG-121", found, f"Leave it out, or give {begins}=.")
    elif asked.strength is None:
        found = f"{begins} are given without strength."
        yield Problem("CFG-121", found, "Give it, for example 0.7: how much of the video is made anew.")
    elif not 0 < asked.strength <= 1 or _evaluated(plan, asked.strength) < 1:
        found = (
            f"strength is {asked.strength}, which takes none of the {plan.settings.num_steps} steps or more than all."
        )
        yield Problem("CFG-121", found, "Use a number above 0 and up to 1 that leaves a step.")


def _evaluated(plan: ClipPlan, strength: float) -> int:
    """Steps that are taken of a video's clip."""
    all_of_them = plan.settings.options.strength_steps == "all"
    return plan.settings.num_steps if all_of_them else int(plan.settings.num_steps * strength)
