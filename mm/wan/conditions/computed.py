"""Features that stores have in another form than the model takes, because that has many more numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mm.config.tasks.task import Source, Task
from mm.wan.conditions.camera import channels_of_path

_OF_SOURCES: Mapping[Source, Callable[[Tensor], Tensor]] = {Source.CAMERA_PATH: channels_of_path}


def computed(features: Mapping[str, Tensor], task: Task) -> dict[str, Tensor]:
    """Features of a micro-batch as the model takes them, each [B, *shape]; those that are so already are kept.

    Args:
        features: by name, each [B, *its shape in stores]. task: whose.
    """
    found = dict(features)
    for feature in task.stored:
        if feature.stored is not None and found[feature.name].dtype == torch.float64:
            of_sample = _OF_SOURCES[feature.source]
            found[feature.name] = torch.stack([of_sample(value) for value in found[feature.name]])
    return found
