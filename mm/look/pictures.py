"""Pictures of what the model is trained on: latents decoded, or in false colours, masks, features of images.

Shapes: C channels, F H W latent frame, T frames, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mm.checkpoint.encoder_paths import video_encoder
from mm.config.data import LATENT_PIXELS, TEMPORAL_STRIDE
from mm.config.model import Precision
from mm.config.run.encoders import Tiles
from mm.config.tasks.frames import MASK_CHANNELS
from mm.config.tasks.task import InputFeature, Sizes, Source, Task
from mm.generate.sampling import decode
from mm.look.facts import Frame, Strip
from mm.wan.encoders import VideoEncoder

_CHANNELS = 16
"""Of latents."""


class Eye(Protocol):
    """Makes pictures of latents."""

    def frames(self, latents: Tensor) -> Tensor:
        """Pictures of latents [C, F, H, W], uint8 [T, height, width, 3]."""

    def moment(self, frame: int) -> tuple[str, int]:
        """Name of the picture of that number, and the frame of the clip that it begins with."""


@dataclass(frozen=True)
class DecodingEye:
    """Decodes latents as generation does; its pictures are the frames of the clip."""

    video: VideoEncoder
    name: str

    def frames(self, latents: Tensor) -> Tensor:
        """Frames; raises DATA-055 for a VAE of another stride than Wan's."""
        _, frames, height, width = latents.shape
        stride = self.video.spatial_stride
        size = ((frames - 1) * TEMPORAL_STRIDE + 1, height * stride, width * stride)
        return decode(self.video, latents.unsqueeze(0), size, self.name)[0]

    def moment(self, frame: int) -> tuple[str, int]:
        """`frame 5`."""
        return f"frame {frame}", frame


@dataclass(frozen=True)
class FalseColourEye:
    """Shows latents without a VAE; its pictures are latent frames, enlarged to the clip's size.

    Attributes:
        latent_pixels: rows and columns of pixels that a latent pixel stands for.
    """

    latent_pixels: int = LATENT_PIXELS

    def frames(self, latents: Tensor) -> Tensor:
        """The three directions in which the latents of a clip differ most, as red, green and blue, enlarged."""
        colours = principal_colours(latents.float().flatten(1).t()).view(*latents.shape[1:], 3)
        return colours.repeat_interleave(self.latent_pixels, 1).repeat_interleave(self.latent_pixels, 2)

    def moment(self, frame: int) -> tuple[str, int]:
        """`latent frame 1`, which begins with frame 1 of the clip."""
        return f"latent frame {frame}", max(0, (frame - 1) * TEMPORAL_STRIDE + 1)


def open_eye(
    vae: Path | None, precision: Precision, tiles: Tiles | None, device: torch.device, latent_pixels: int
) -> Eye:
    """Open what latents are looked at with: a VAE, or false colours where there is none.

    Args:
        vae, precision, tiles, device: of the VAE. latent_pixels: of false colours, as `FalseColourEye` has them.

    Raises:
        CheckpointError, DataError: what `mm.checkpoint.encoder_paths.video_encoder` raises.
    """
    if vae is None:
        return FalseColourEye(latent_pixels)
    return DecodingEye(video_encoder(vae, precision, device, tiles), str(vae))


def principal_colours(rows: Tensor) -> Tensor:
    """Rows [n, C] as colours, uint8 [n, 3]: their first three principal components, five deviations wide.

    A component's sign is that of its largest coefficient, so that equal rows get equal colours.
    """
    centred = rows - rows.mean(0)
    _, vectors = torch.linalg.eigh(centred.t() @ centred)  # ascending
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = centred @ axes
    deviation = parts.square().mean(0).sqrt().clamp(min=1e-6)
    return ((parts / (5 * deviation) + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def shown(count: int, most: int) -> list[int]:
    """Numbers of at most so many of `count` frames, the first and the last among them, evenly spaced."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)}) if most > 1 else [0]


def clip_strip(eye: Eye, latents: Tensor, sources: Sequence[int] | None, most: int) -> Strip:
    """The clip itself.

    Args:
        eye: what it is looked at with. latents: [C, F, H, W]. sources: number in the source of each frame of the clip,
            where it is known. most: frames to show.
    """
    frames = eye.frames(latents)
    numbers = shown(len(frames), most)

    def label(number: int) -> str:
        name, first = eye.moment(number)
        return name if sources is None or first >= len(sources) else f"{name} · source {sources[first]}"

    return Strip("clip", [Frame(frames[number].numpy(), label(number)) for number in numbers])


def strips_in_front(eye: Eye, task: Task, latents: Tensor) -> Iterator[Strip]:
    """The images in front of a clip, all of them, each decoded alone as it was encoded.

    Args:
        eye: what they are looked at with. task: its declaration. latents: [C, R, H, W], a frame for each.
    """
    pictures = [eye.frames(frame)[0].numpy() for frame in latents.split(1, dim=1) if frame.shape[1]]
    for media in task.media:
        if media.in_front and pictures:
            frames = [Frame(picture, f"image {number}") for number, picture in enumerate(pictures, start=1)]
            yield Strip(
                media.listed, frames, "in front of the clip; each is noised and learned as a latent frame of it"
            )


def feature_strips(eye: Eye, task: Task, features: Mapping[str, Tensor], most: int, in_front: int = 0) -> list[Strip]:
    """Pictures of what a sample has beside clip and caption.

    Args:
        eye, most: as in `clip_strip`. task: its declaration. features: as the model gets them, by name.
        in_front: latent frames in front of the clip's, of which `strips_in_front` has pictures.
    """
    return [strip for one in task.stored for strip in strips_of(eye, one, features[one.name], most, in_front)]


def strips_of(eye: Eye, feature: InputFeature, value: Tensor, most: int, in_front: int = 0) -> list[Strip]:
    """Pictures of one feature; none of a number, and of a camera's path.

    Args:
        eye, most, in_front: as in `clip_strip` and `feature_strips`. feature: its declaration.
        value: as the model gets it, of one sample.
    """
    return _VIEWS[feature.source](_Asked(eye, feature, _images_of(feature), most, in_front), value)


def _images_of(feature: InputFeature) -> int:
    """Images whose tokens a feature has; 1 of others."""
    return feature.shape(Sizes(1, (1, 1, 1), 1, 1))[0] if feature.source is Source.IMAGE_ENCODER else 1


def numbers_of(task: Task, features: Mapping[str, Tensor]) -> dict[str, float]:
    """Features of a sample that are numbers, by title."""
    return {feature.title: float(features[feature.name]) for feature in task.made_by(Source.COLUMN)}


@dataclass(frozen=True)
class _Asked:
    """One feature to be shown: how, its declaration, the images that it has tokens of, the frames to show, and its
    latent frames in front of the clip's.
    """

    eye: Eye
    feature: InputFeature
    images: int
    most: int
    in_front: int


def _known_frames(asked: _Asked, value: Tensor) -> list[Strip]:
    """The video of the given frames, and the mask, white where a frame is given."""
    eye = asked.eye
    mask, latents = value[:MASK_CHANNELS].float(), value[MASK_CHANNELS:]
    frames = eye.frames(latents)
    masks = _mask_frames(mask, len(frames), frames.shape[1:3])
    numbers = shown(len(frames), asked.most)
    labels = [eye.moment(number)[0] for number in numbers]
    whole = [eye.moment(number)[0] for number in range(len(masks)) if bool((masks[number] == 255).all())]
    about = "what is given of the clip, with grey for the rest"
    given = f"white is given, black is to be made; given: {', '.join(whole) or 'no whole frame'}"
    return [
        Strip(title, [Frame(made[number].numpy(), label) for number, label in zip(numbers, labels, strict=True)], note)
        for title, made, note in ((asked.feature.title.lower(), frames, about), ("mask", masks, given))
    ]


def _mask_frames(mask: Tensor, count: int, size: torch.Size) -> Tensor:
    """A mask [4, F, H, W] as pictures of `count` frames, uint8 [count, height, width, 3]."""
    if count == mask.shape[1]:
        of_frames = mask.mean(0)
    else:  # the first latent frame is one frame, each other has a channel for each of its frames
        of_frames = torch.cat((mask[:1, 0], mask[:, 1:].transpose(0, 1).flatten(0, 1)))
    rows, columns = size[0] // mask.shape[2], size[1] // mask.shape[3]
    grey = (of_frames.clamp(0, 1) * 255).round().to(torch.uint8)
    return grey.repeat_interleave(rows, 1).repeat_interleave(columns, 2).unsqueeze(-1).expand(-1, -1, -1, 3)


def _image_tokens(asked: _Asked, value: Tensor) -> list[Strip]:
    """Tokens of the image encoder in false colours: of each image its patches as they lie, without its first token."""
    frames = []
    for number, tokens in enumerate(value.float().chunk(asked.images), start=1):
        patches = principal_colours(tokens[1:])
        rows = math.isqrt(len(patches))
        if not rows or rows**2 != len(patches):
            rows = 1
        picture = patches.view(rows, -1, 3)
        scale = max(1, 128 // picture.shape[1])
        frames.append(Frame(picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy(), f"image {number}"))
    note = f"{len(value)} tokens in false colours"
    return [Strip(asked.feature.title.lower(), frames, note)]


def _latents(asked: _Asked, value: Tensor) -> list[Strip]:
    """Latents, of several parts each by itself; of one frame without the axis of frames, too."""
    if value.ndim == 3:
        value = value.unsqueeze(1)
    parts = {} if asked.feature.parts is None else asked.feature.parts(Sizes(_CHANNELS, (1, 1, 1), 0, 0))
    split = value.split(list(parts.values())) if parts else (value,)
    strips = []
    for name, latents in zip(parts or {asked.feature.title.lower(): 0}, split, strict=True):
        frames = asked.eye.frames(latents)
        shown_frames = [Frame(frames[n].numpy(), asked.eye.moment(n)[0]) for n in shown(len(frames), asked.most)]
        strips.append(Strip(name, shown_frames, "" if bool(latents.any()) else "nothing is given"))
    return strips


def _context(asked: _Asked, value: Tensor) -> list[Strip]:
    """Latents of what stays and of what changes; of the mask the mean of its channels, white where all changes."""
    assert asked.feature.parts is not None  # noqa: S101  as it is declared
    parts = asked.feature.parts(Sizes(_CHANNELS, (1, 1, 1), 0, 0))
    strips = []
    of_clip = value[:, asked.in_front :].float()
    for name, part in zip(parts, of_clip.split(list(parts.values())), strict=True):
        if name == "mask":
            frames = _mask_frames(part.mean(0, keepdim=True), part.shape[1], torch.Size(8 * n for n in part.shape[2:]))
        else:
            frames = asked.eye.frames(part)
        numbers = shown(len(frames), asked.most)
        strips.append(Strip(name, [Frame(frames[n].numpy(), asked.eye.moment(n)[0]) for n in numbers]))
    return strips


def _nothing(asked: _Asked, value: Tensor) -> list[Strip]:
    """No picture: a number is shown as one."""
    del asked, value
    return []


_VIEWS: dict[Source, Callable[[_Asked, Tensor], list[Strip]]] = {
    Source.KNOWN_FRAMES: _known_frames,
    Source.KNOWN_PIXELS: _known_frames,
    Source.IMAGE_ENCODER: _image_tokens,
    Source.COLUMN: _nothing,
    Source.CONTROL_VIDEO: _latents,
    Source.REFERENCE_IMAGE: _latents,
    Source.EDITED_VIDEO: _context,
    Source.START_IMAGE: _latents,
    Source.CAMERA_PATH: _nothing,
}
