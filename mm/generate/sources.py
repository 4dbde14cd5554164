"""Sources of a clip's features that the model's task declares, one function for each.

Encoders that nothing else needs run before the transformer is there and leave the device to it; what the VAE makes
waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.config.tasks.task import Frame, InputFeature, Source, Task
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder


@dataclass(frozen=True)
class Given:
    """Inputs of a clip beside its prompt, as values.

    Attributes:
        images: the given frames, [3, height, width] in [-1, 1] each. columns: the task's numbers, by name.
    """

    images: tuple[Tensor, ...] = ()
    columns: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EarlyFeatures:
    """Makes the features that need no VAE.

    Attributes:
        task: the model's. image_encoder: where the task has a feature of it.
    """

    task: Task
    image_encoder: ImageEncoder | None

    def of(self, given: Given) -> dict[str, Tensor]:
        """Those of one clip, [*shape] by name, on the CPU."""
        found = {}
        for feature in self.task.features:
            if feature.source in _EARLY:
                found[feature.name] = _EARLY[feature.source](self, feature, given)
        return found


def late_features(
    task: Task, video: VideoEncoder, given: Sequence[Given], frames: Sequence[Frame], num_frames: int
) -> dict[str, Tensor]:
    """The features that the VAE makes, of some clips, [B, *shape] by name, on the VAE's device.

    Args:
        task: the model's. video: the VAE. given: of each clip.
        frames: which frames of the clips the images are. num_frames: of the clips, in pixels.

    Raises:
        DataError: DATA-044 for a VAE that is not Wan's.
    """
    return {
        feature.name: _WITH_VAE[feature.source](video, given, frames, num_frames)
        for feature in task.features
        if feature.source in _WITH_VAE
    }


def _image_features(early: EarlyFeatures, feature: InputFeature, given: Given) -> Tensor:
    """[I, img_dim], one image at a time.

    A model that was made for one image sees the first one alone; the last one reaches it through its latents.
    """
    del feature
    encoder = early.image_encoder
    assert encoder is not None  # noqa: S101  whoever reads a configuration refuses such a task without it
    seen = given.images[: len(early.task.frames)]
    return torch.cat([encoder.encode(image.unsqueeze(0))[0] for image in seen]).cpu()


def _column(early: EarlyFeatures, feature: InputFeature, given: Given) -> Tensor:
    """The number, fp32, without axes."""
    del early
    return torch.tensor(given.columns[feature.name])


def _known_frames(video: VideoEncoder, given: Sequence[Given], frames: Sequence[Frame], num_frames: int) -> Tensor:
    """Mask and latents of the given frames of each clip, [B, 4 + C, F, H, W]."""
    by_index = {frame.index: torch.stack([of.images[which] for of in given]) for which, frame in enumerate(frames)}
    return condition_latents(video.encode, by_index, num_frames)


_EARLY: dict[Source, Callable[[EarlyFeatures, InputFeature, Given], Tensor]] = {
    Source.IMAGE_ENCODER: _image_features,
    Source.COLUMN: _column,
}
_WITH_VAE: dict[Source, Callable[[VideoEncoder, Sequence[Given], Sequence[Frame], int], Tensor]] = {
    Source.KNOWN_FRAMES: _known_frames,
}
