"""Rules about the arguments of `generate_videos`, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mm.api.arguments import ImageInput, VideoInput, column_problems
from mm.config.rules.generation import size_problems
from mm.config.rules.tasks import not_generated
from mm.config.run.generation import VAE_STRIDE
from mm.config.tasks.task import Task
from mm.errors import Problem
from mm.generate.sampling import ClipPlan


@dataclass(frozen=True)
class Asked:
    """Arguments of a generation, as they were given.

    Attributes:
        prompts, images, videos: one for each video. columns: the same of each task's number, by name.
        strength: with videos. batch_size: prompts in one forward.
    """

    prompts: tuple[str, ...]
    images: tuple[tuple[ImageInput, ...], ...] | None
    videos: tuple[VideoInput, ...] | None
    columns: Mapping[str, Sequence[float]]
    strength: float | None
    batch_size: int


def generation_problems(asked: Asked, plan: ClipPlan, task: Task) -> Iterator[Problem]:
    """CFG-060, CFG-061, CFG-063, CFG-120, CFG-121, CFG-123 and CFG-200.

    Args:
        asked: what. plan: how. task: whose frames are given.
    """
    yield from size_problems(plan.size, plan.wan.patch_size, "size")
    yield from _number_problems(asked, plan)
    yield from _length_problems(asked)
    yield from not_generated(plan.wan.task)
    yield from _frame_problems(asked, plan, task)
    yield from _video_problems(asked, plan)
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
    if not settings.guidance_scale >= 0:
        yield Problem("CFG-200", f"guidance_scale is {settings.guidance_scale}.", "Give 0 or more.")
    if settings.batched_guidance and settings.guidance_scale == 1:
        found = "batched_guidance has no effect with guidance_scale 1."
        yield Problem("CFG-063", found, "Leave it out, or choose another guidance_scale.")


def _length_problems(asked: Asked) -> Iterator[Problem]:
    lists = {"images": asked.images, "videos": asked.videos, **asked.columns}
    for name, given in lists.items():
        if given is not None and len(given) != len(asked.prompts):
            found = f"There are {len(asked.prompts)} prompts and {len(given)} of {name}."
            yield Problem("CFG-200", found, "Give one for each prompt, in the same order.")


def _frame_problems(asked: Asked, plan: ClipPlan, task: Task) -> Iterator[Problem]:
    expected = len(task.frames)
    what = f"{plan.wan.task.title} models take {expected or 'no'} image{'' if expected == 1 else 's'}"
    for index, given in enumerate(asked.images or [()] * len(asked.prompts)):
        if len(given) != expected:
            yield Problem("CFG-120", f"Prompt {index} has {len(given)} images; {what}.", "Correct images=.")
    if expected > 1 and plan.size[0] < VAE_STRIDE[0] + 1:
        found = f"A clip of {plan.size[0]} frames has no first and last one."
        yield Problem("CFG-123", found, f"Use {VAE_STRIDE[0] + 1} frames or more.")


def _video_problems(asked: Asked, plan: ClipPlan) -> Iterator[Problem]:
    if asked.videos is None:
        if asked.strength is not None:
            yield Problem("CFG-121", "strength has no effect without videos.", "Leave it out, or give videos=.")
        return
    if plan.wan.task.with_video is None:
        found = f"{plan.wan.task.title} models take no videos."
        yield Problem("CFG-120", found, "Leave videos out, or load a text-to-video model.")
    if asked.strength is None:
        found = "videos are given without strength."
        yield Problem("CFG-121", found, "Give it, for example 0.7: how much of the video is made anew.")
    elif not 0 < asked.strength <= 1 or int(plan.settings.num_steps * asked.strength) < 1:
        found = (
            f"strength is {asked.strength}, which takes none of the {plan.settings.num_steps} steps or more than all."
        )
        yield Problem("CFG-121", found, "Use a number above 0 and up to 1 that leaves a step.")
