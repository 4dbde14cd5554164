"""Sources of the features of a clip that its task declares, one function for each `mm.config.tasks.task.Source`.

Frames that are given are frames of the very clip that is encoded, so that what a model is shown and what it is to make
agree. Media beside the clip were read as it was (`mm.data.beside`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.config.tasks.frames import CLIP_TOKEN_LEN, FIRST
from mm.config.tasks.task import Entry, InputFeature, Source, Task
from mm.data.clips import Clip
from mm.errors import DataError
from mm.wan.conditions.control import control_condition, reference_latents, start_condition
from mm.wan.conditions.inpaint import inpaint_condition
from mm.wan.conditions.known_frames import condition_latents
from mm.wan.conditions.pixels import ClipSize
from mm.wan.conditions.random_masks import ZEROED, draw_zeroing, random_mask
from mm.wan.conditions.vace import blanked, vace_context
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder

FeatureMaker = Callable[[Clip, Mapping[str, float]], Tensor]
"""A clip, and what stands in the task's columns, to its feature, [*shape]."""


@dataclass(frozen=True)
class VisualEncoders:
    """Encoders that features of clips are made with, loaded.

    Attributes:
        task: whose features. video: the clips' VAE.
        conditions: the same VAE for known frames, which may be encoded in other tiles.
        image: the image encoder, where the task has a feature of it. image_name: what to call it.
    """

    task: Task
    video: VideoEncoder
    conditions: VideoEncoder
    image: ImageEncoder | None = None
    image_name: str = "The image encoder"


def feature_makers(encoders: VisualEncoders) -> dict[str, FeatureMaker]:
    """The makers of all features of the task, by the features' names.

    Raises:
        DataError: DATA-045 for an image encoder of another model.
    """
    return {feature.name: _MAKERS[feature.source](encoders, feature) for feature in encoders.task.stored}


def latents_in_front(task: Task, features: Mapping[str, Tensor], clip: Tensor) -> Tensor:
    """Latent frames of images that stand in front of a clip's, which are noised and learned as the clip's own are.

    DiffSynth-Studio's and VideoX-Fun's trainers do so, and leave none of these frames out of the loss.

    Args:
        task: its declaration. features: of the clip, by name. clip: its latents, [C, F, H, W].

    Returns:
        [C, R, H, W]: the first frames of the side blocks' context, where these latents are the first channels.
    """
    for feature in task.entering(Entry.SIDE_BLOCKS):
        context = features[feature.name]
        return context[: len(clip), : context.shape[1] - clip.shape[1]]
    return clip[:, :0]


def _image_features(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """Tokens of the given frames, one frame's after the other's."""
    del feature
    image = encoders.image
    assert image is not None  # noqa: S101  whoever reads a configuration refuses such a task without it
    if image.num_tokens != CLIP_TOKEN_LEN:
        message = f"{encoders.image_name} makes {image.num_tokens} tokens of an image, Wan2.1 takes {CLIP_TOKEN_LEN}."
        raise DataError("DATA-045", message, "Use the image_encoder of a Wan2.1 I2V or FLF2V model.")
    task = encoders.task

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        return image.encode(torch.stack(seen_images(task, clip))).flatten(0, 1)

    return make


def seen_images(task: Task, clip: Clip) -> list[Tensor]:
    """The images that the image encoder sees, [3, H, W]: the given frames; of a task with images beside the clip its
    reference, or else its start image; of one without either the clip's first frame.
    """
    if not any(media.kind == "image" for media in task.media):
        return [clip.pixels[:, frame.index] for frame in task.frames or (FIRST,)]
    given = [clip.beside[media.name] for media in task.media if media.kind == "image" and media.name in clip.beside]
    return given[-1:]


def _known_frames(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """The mask of the given frames and the latents of a video of them."""
    del feature
    vae, indices = encoders.conditions, [frame.index for frame in encoders.task.frames]

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        known = {index: clip.pixels[None, :, index] for index in indices}
        return condition_latents(vae.encode, known, clip.num_frames)[0]

    return make


def _known_pixels(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """The mask of the given pixels and the latents of a video of them, by a mask that is listed or one that is drawn.

    Where nothing is given all is zero for 9 in 10 samples, as models are told that they make all of a video.
    """
    del feature
    vae = encoders.conditions

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        size, mask = _size(clip), clip.beside.get("mask")
        mask = random_mask(size, *clip.key) if mask is None else mask
        is_zero = draw_zeroing(ZEROED, *clip.key)
        return inpaint_condition(vae.encode, size, clip.pixels, mask, nothing_known_is_zero=is_zero)

    return make


def _control_video(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """Latents of the control video and of the start image."""
    del feature
    vae = encoders.conditions

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        return control_condition(vae.encode, _size(clip), clip.beside["control"], clip.beside.get("first_frame"))

    return make


def _reference_image(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """Latents of the reference image; zeros where there is none."""
    del feature
    vae = encoders.conditions

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        found = reference_latents(
            vae.encode, _size(clip), clip.beside.get("reference"), len(vae.vae.config.latents_mean)
        )
        return found.to(vae.vae.dtype)

    return make


def _start_image(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """Latents of the start image."""
    del feature
    vae = encoders.conditions

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        return start_condition(vae.encode, _size(clip), clip.beside["first_frame"])

    return make


def _camera_path(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """The path as it was read; rays, 10,000 times as many numbers, are made of it where the model is given them."""
    del encoders, feature

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        return clip.beside["camera"]

    return make


def _edited_video(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """Latents of what the mask keeps of a video and of what it gives free, and the mask.

    Of the clip itself only what the mask keeps is shown, without a mask nothing; a video of its own is shown as it is.
    References stand in front.
    """
    del feature
    vae, in_front = encoders.conditions, [media.name for media in encoders.task.media if media.in_front]

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del columns
        video, mask = clip.beside.get("vace_video"), clip.beside.get("mask")
        if video is None and mask is not None:
            video = blanked(clip.pixels, mask)
        references = [image for role in in_front if role in clip.beside for image in clip.beside[role]]
        return vace_context(vae.encode, _size(clip), video, mask, references)

    return make


def _size(clip: Clip) -> ClipSize:
    return ClipSize(*clip.pixels.shape[1:])


def _column(encoders: VisualEncoders, feature: InputFeature) -> FeatureMaker:
    """The number, fp32, without axes."""
    del encoders

    def make(clip: Clip, columns: Mapping[str, float]) -> Tensor:
        del clip
        return torch.tensor(columns[feature.name])

    return make


_MAKERS: dict[Source, Callable[[VisualEncoders, InputFeature], FeatureMaker]] = {
    Source.IMAGE_ENCODER: _image_features,
    Source.KNOWN_FRAMES: _known_frames,
    Source.KNOWN_PIXELS: _known_pixels,
    Source.COLUMN: _column,
    Source.CONTROL_VIDEO: _control_video,
    Source.REFERENCE_IMAGE: _reference_image,
    Source.EDITED_VIDEO: _edited_video,
    Source.START_IMAGE: _start_image,
    Source.CAMERA_PATH: _camera_path,
}
