"""Inputs of a model, as DiffSynth-Studio's arguments name them: the task whose features they make.

Which inputs a model takes follows from its task's declaration (`mm.config.tasks.task`): frames of the clip, numbers and
files beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mm.config.base import hint
from mm.config.model import WanConfig
from mm.config.tasks.registry import FEATURE_TASKS, TASKS
from mm.config.tasks.task import Column, Frame, Media, Source, Task
from mm.dialects.diffsynth.train_flags import DiffSynthFlags
from mm.errors import Problem

FIRST, LAST = "input_image", "end_image"
_OF_ROLES: Mapping[str, str] = {
    "first": FIRST,
    "last": LAST,
    "first_frame": FIRST,
    "control": "control_video",
    "reference": "reference_image",
    "vace_video": "vace_video",
    "mask": "vace_video_mask",
    "vace_reference": "vace_reference_image",
}
"""Inputs by the name of the role that gives them."""
_CAMERA = ("camera_control_direction", "camera_control_speed")
_DROPPED = {FIRST: "start", "reference_image": "reference"}
"""Words of `ConditionDropout` for inputs that are otherwise taken from the clip itself."""
_CONTAINS = "input_contains_"
POSES = "camera"
"""Column of files of camera poses."""


@dataclass(frozen=True)
class ModelInputs:
    """Meaning of the inputs that a command line names.

    Attributes:
        task: of the features.
        dropped: conditions that no sample has, as `mm.config.run.data.ConditionDropout` calls them.
        first_frame_share: share of samples whose own first frame is given clean; None of models that have none.
        notes: lines for the log.
    """

    task: str
    dropped: tuple[str, ...] = ()
    first_frame_share: float | None = None
    notes: tuple[str, ...] = ()


def named_inputs(flags: DiffSynthFlags) -> dict[str, str]:
    """The inputs that a command line names, each with the flag that does."""
    words = (flags.extra_inputs or "").split(",")
    found = {word.strip(): "--extra_inputs" for word in words if word.strip()}
    for name in type(flags).model_fields:
        if name.startswith(_CONTAINS) and getattr(flags, name) is True:
            found.setdefault(name.removeprefix(_CONTAINS), f"--{name}")
    return found


def inputs_of(wan: WanConfig, named: Mapping[str, str]) -> ModelInputs:
    """The features that a model is trained on.

    Args:
        wan: the model. named: `named_inputs`; of what `input_problems` refuses any may come.
    """
    task = wan.task
    other = _with_known_pixels(task)
    if LAST in named and other is not None:
        return ModelInputs(other.name, notes=(_NOTE_OF_MASKS,))
    unnamed = [word for word in _from_clip(task) if word not in named]
    dropped = [_DROPPED[word] for word in unnamed if word in _DROPPED]
    if unnamed and len(unnamed) == len(_from_clip(task)) and task.made_by(Source.IMAGE_ENCODER):
        dropped.append("image")
    share = float(FIRST in named) if wan.first_frame_share else None
    return ModelInputs(task.name, tuple(word for word in dropped if word in task.dropped), share)


_NOTE_OF_MASKS = (
    f"--input_contains_{LAST}: known pixels are drawn as Fun-InP models were trained with them, a fifth of the samples "
    "with the first and the last frames, others with other masks"
)


def columns_of(named: Mapping[str, str]) -> frozenset[str]:
    """Columns of the metadata that a training looks at; first and last frame are the clip's own."""
    return frozenset(("video", "image", "prompt", POSES, *named)) - {FIRST, LAST}


def input_problems(wan: WanConfig, named: Mapping[str, str], file_keys: tuple[str, ...]) -> Iterator[Problem]:
    """CFG-384: inputs that are not known, that a model does not take, or that it lacks.

    Args:
        wan, named: as for `inputs_of`. file_keys: further columns of files.
    """
    task = wan.task
    taken, every = _taken(task), {word for other in TASKS.values() for word in _taken(other)}
    for word, flag in named.items():
        if word in _CAMERA and _takes_poses(task):
            found = f"{flag} {word}: training takes a camera's path from files of poses."
            remedy = f"Write one for each video, name it in a column {POSES}, and add that to --data_file_keys."
            yield Problem("CFG-384", found, f"{remedy} Remove {word}.")
        elif word not in every and word not in _CAMERA:
            found = f"{flag} {word} is no input of a Wan model.{hint(word, sorted(every))}"
            yield Problem("CFG-384", found, f"The inputs are {', '.join(sorted(every))}.")
        elif word not in taken and not (word == LAST and FIRST in named and _with_known_pixels(task)):
            yield _not_taken(task, word, flag)
    yield from _lacking(task, taken, named)
    yield from _ambiguous(task, named)
    if _takes_poses(task) and POSES not in file_keys:
        found = f"{task.title} models are given a camera's path, and --data_file_keys names no column {POSES}."
        yield Problem("CFG-384", found, "Add the column, with a file of poses for each video, and name it there.")


def _taken(task: Task) -> dict[str, Frame | Column | Media]:
    """Inputs of a task, by their names there."""
    found: dict[str, Frame | Column | Media] = {}
    for role in task.roles:
        name = role.name if isinstance(role, Column) else _OF_ROLES.get(role.name)
        if name is not None:
            found[name] = role
    return found


def _from_clip(task: Task) -> list[str]:
    """Inputs that are images of the clip where no file is listed."""
    return [
        word
        for word, role in _taken(task).items()
        if isinstance(role, Media) and role.kind == "image" and role.from_clip is not None
    ]


def _takes_poses(task: Task) -> bool:
    return any(media.kind == "poses" for media in task.media)


def _with_known_pixels(task: Task) -> Task | None:
    """The task of features that trains the same models with any pixels given."""
    others = (other for other in FEATURE_TASKS.values() if other.models_of == task.name)
    return next((other for other in others if other.made_by(Source.KNOWN_PIXELS)), None)


def _not_taken(task: Task, word: str, flag: str) -> Problem:
    if word in _CAMERA:
        who = [other.title for other in TASKS.values() if _takes_poses(other)]
    else:
        who = [other.title for other in TASKS.values() if word in _taken(other)]
    found = f"{flag} {word} is no input of {task.title} models; it is one of {', '.join(who)} models."
    return Problem("CFG-384", found, "Remove it, or name another model.")


def _lacking(task: Task, taken: Mapping[str, Frame | Column | Media], named: Mapping[str, str]) -> Iterator[Problem]:
    for word, role in taken.items():
        is_needed = not isinstance(role, Media) or role.required
        if is_needed and word not in named:
            found = f"{task.title} models are given {word}, and no argument names it."
            yield Problem("CFG-384", found, f"Add it to --extra_inputs, or --{_CONTAINS}{word}.")


def _ambiguous(task: Task, named: Mapping[str, str]) -> Iterator[Problem]:
    """A clip gives one image."""
    of_clip = _from_clip(task)
    if FIRST in named and FIRST in of_clip and len(of_clip) > 1:
        others = " and ".join(word for word in of_clip if word != FIRST)
        found = f"{named[FIRST]} {FIRST} beside {others}: one image goes with a clip of {task.title} models."
        yield Problem("CFG-384", found, f"Remove {FIRST}.")
