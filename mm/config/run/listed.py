"""Lists of a generation that belong to a task: what a line of each holds, beside the prompt of the same line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from mm.config.tasks.task import ListName, MediaKind, Source, Task

LISTS: tuple[ListName, ...] = get_args(ListName)


@dataclass(frozen=True)
class Listed:
    """A list that a task's models can be given.

    Attributes:
        kind: of what stands in it. needed: whether it must be given.
        fewest, most: paths of a line; a line without any is blank. No most where any number will do.
    """

    kind: MediaKind
    needed: bool
    fewest: int = 1
    most: int | None = 1


@dataclass(frozen=True)
class Shown:
    """Ways to say what a model with given frames sees of its clip (`Task.with_mask`): frames, unless one is true.

    Attributes:
        masked: the pixels of a video that a mask leaves. nothing: none at all.
    """

    masked: bool = False
    nothing: bool = False


def lists_of(task: Task, shown: Shown) -> Mapping[ListName, Listed]:
    """The lists that models of a task take.

    Args:
        task: whose frames are given. shown: how a model with given frames is told them.
    """
    return {**_seen(task, shown), begins_as(task, shown): Listed("video", needed=False)}


def begins_as(task: Task, shown: Shown) -> ListName:
    """The list of videos that clips begin as, with noise: `videos`, unless the model sees those of that list.

    Args:
        task, shown: as for `lists_of`.
    """
    return "input_videos" if "videos" in _seen(task, shown) else "videos"


def _seen(task: Task, shown: Shown) -> dict[ListName, Listed]:
    """The lists of what the model sees."""
    if task.with_mask and shown.nothing:
        return {}
    if task.with_mask and shown.masked:
        return {"videos": Listed("video", needed=True), "masks": Listed("mask", needed=True)}
    found: dict[ListName, Listed] = {}
    if task.frames:
        found["images"] = Listed("images", True, len(task.frames), len(task.frames))
    for media in task.media:
        most = None if media.kind == "images" else 1
        found[media.listed] = Listed(media.kind, media.required, int(media.required), most)
    return found


def every_list_of(task: Task) -> frozenset[ListName]:
    """The lists that models of a task take in one way or another."""
    ways = (Shown(), Shown(masked=True))
    return frozenset(name for shown in ways for name in lists_of(task, shown))


def sees_images(task: Task, given: frozenset[ListName], shown: Shown) -> bool:
    """Tell whether the image encoder is asked: a model with its features is given an image, or a masked video.

    Args:
        task: the model's. given: lists that are there. shown: as for `lists_of`.
    """
    if not task.made_by(Source.IMAGE_ENCODER) or shown.nothing:
        return False
    return bool(task.frames) or not given.isdisjoint(("images", "references"))
