"""What makes the features of a clip that its task declares, one function for each `mm.config.tasks.task.Source`.

Frames that are given are frames of the very clip that is encoded, so that what a model is shown and what it is to make
agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mm.config.run.encoders import EncodersSection
from mm.config.tasks.frames import CLIP_TOKEN_LEN
from mm.config.tasks.task import InputFeature, Source, Task
from mm.data.clips import Clip
from mm.data.metadata import VideoSample
from mm.errors import DataError
from mm.wan.condition import condition_latents
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder

FeatureMaker = Callable[[Clip, VideoSample], Tensor]
"""A clip, and what is listed of it, to its feature, [*shape]."""


@dataclass(frozen=True)
class Encoders:
    """What features are made with.

    Attributes:
        named: their section. video: the clips' VAE. task: whose features. device: where encoders run.
    """

    named: EncodersSection
    video: VideoEncoder
    task: Task
    device: torch.device


def feature_makers(encoders: Encoders) -> dict[str, FeatureMaker]:
    """The makers of all features of the task, by the features' names.

    Raises:
        DataError: DATA-040 to DATA-042 for an encoder that cannot be loaded, DATA-045 for one of another model.
    """
    return {feature.name: _MAKERS[feature.source](encoders, feature) for feature in encoders.task.features}


def _image_features(encoders: Encoders, feature: InputFeature) -> FeatureMaker:
    """Tokens of the given frames, one frame's after the other's."""
    del feature
    assert encoders.named.image is not None  # noqa: S101  check_extraction refuses such a task without it
    folder = Path(encoders.named.image.from_pretrained)
    clip_encoder = ImageEncoder.from_pretrained(folder, encoders.named.image_precision, encoders.device)
    if clip_encoder.num_tokens != CLIP_TOKEN_LEN:
        message = f"{folder} makes {clip_encoder.num_tokens} tokens of an image, Wan2.1 takes {CLIP_TOKEN_LEN}."
        raise DataError("DATA-045", message, "Use the image_encoder of a Wan2.1 I2V or FLF2V model.")
    indices = [frame.index for frame in encoders.task.frames]

    def make(clip: Clip, sample: VideoSample) -> Tensor:
        del sample
        return clip_encoder.encode(torch.cat([clip.pixels[None, :, index] for index in indices])).flatten(0, 1)

    return make


def _known_frames(encoders: Encoders, feature: InputFeature) -> FeatureMaker:
    """The mask of the given frames and the latents of a video of them."""
    del feature
    vae = VideoEncoder(encoders.video.vae, encoders.named.vae.tiles_of_conditions())
    indices = [frame.index for frame in encoders.task.frames]

    def make(clip: Clip, sample: VideoSample) -> Tensor:
        del sample
        return condition_latents(vae, {index: clip.pixels[None, :, index] for index in indices}, clip.num_frames)[0]

    return make


def _column(encoders: Encoders, feature: InputFeature) -> FeatureMaker:
    """The number, fp32, without axes."""
    del encoders

    def make(clip: Clip, sample: VideoSample) -> Tensor:
        del clip
        return torch.tensor(sample.columns[feature.name])

    return make


_MAKERS: dict[Source, Callable[[Encoders, InputFeature], FeatureMaker]] = {
    Source.IMAGE_ENCODER: _image_features,
    Source.KNOWN_FRAMES: _known_frames,
    Source.COLUMN: _column,
}
