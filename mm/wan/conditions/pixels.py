"""Pixels that conditions are made of: their encoder, the size of a clip, and checks of what is given.

Functions of this room take one sample without a batch axis unless they say otherwise. Latents that stand for something
that is not given are exact zeros, which no picture has for its code.

Shapes: C latent channels, F H W latent frames, height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mm.config.data import LATENT_PIXELS, TEMPORAL_STRIDE
from mm.errors import ConfigError

Encode = Callable[[Tensor], Tensor]
"""The VAE: pixels [B, 3, frames, height, width] in [-1, 1] to latents [B, C, F, H, W], `VideoEncoder.encode`."""
LATENT_CHANNELS = 16
"""C of Wan2.1's VAE."""
_ROUNDING = 1 / 255
"""By so much numbers may leave their range: resizing rounds."""


@dataclass(frozen=True)
class ClipSize:
    """Size of a clip, in pixels.

    Attributes:
        frames: 4k + 1. height, width: multiples of 8.

    Raises:
        ConfigError: CFG-255 for another number of frames or another size.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        require_whole_groups(self.frames)
        if min(self.height, self.width) < 1 or self.height % LATENT_PIXELS or self.width % LATENT_PIXELS:
            found = f"A clip of {self.height}x{self.width} pixels is no whole number of latents."
            raise ConfigError("CFG-255", found, f"Give multiples of {LATENT_PIXELS}.")

    @property
    def latent(self) -> tuple[int, int, int]:
        """F, H, W of its latents."""
        frames = (self.frames - 1) // TEMPORAL_STRIDE + 1
        return frames, self.height // LATENT_PIXELS, self.width // LATENT_PIXELS

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"


def group_frames(per_frame: Tensor) -> Tensor:
    """Group what there is for each frame by the latent frame that stands for it: [frames, ...] to [F, 4, ...].

    A latent frame stands for 4 frames; the first one for the first frame alone, which comes four times.

    Raises:
        ConfigError: CFG-255 for a number of frames that is not 4k + 1.
    """
    require_whole_groups(len(per_frame))
    return torch.cat((per_frame[:1].expand(TEMPORAL_STRIDE - 1, *per_frame.shape[1:]), per_frame)).unflatten(
        0, (-1, TEMPORAL_STRIDE)
    )


def require_whole_groups(num_frames: int) -> None:
    """Refuse a number of frames that is not 4k + 1, with CFG-255."""
    if num_frames < 1 or num_frames % TEMPORAL_STRIDE != 1:
        nearest = max(num_frames - 1, 0) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1
        message = f"A clip has {num_frames} frames, expected 4k + 1."
        raise ConfigError("CFG-255", message, f"Give {nearest} or {nearest + TEMPORAL_STRIDE} frames.")


def require_video(video: Tensor, size: ClipSize, title: str) -> None:
    """Refuse a video that is not [3, frames, height, width] in [-1, 1] of the clip.

    Args:
        video: the pixels. size: of the clip. title: what to call the video.

    Raises:
        ConfigError: CFG-253 for fewer or more frames or another size, CFG-256 for pixels of another kind.
    """
    require_pixels(video, title)
    found, wanted = tuple(video.shape), (3, size.frames, size.height, size.width)
    if len(found) != len(wanted) or found[0] != 3 or found[2:] != wanted[2:] or found[1] > size.frames:
        message = f"{title} is {list(found)}, expected {list(wanted)}: RGB, and the clip's {size}."
        raise ConfigError("CFG-253", message, "Take the frames that the clip has, and resize and crop them as it.")
    if found[1] < size.frames:
        message = f"{title} ends after {found[1]} of the clip's {size.frames} frames."
        raise ConfigError("CFG-253", message, "Give one that is as long as the clip, or make the clip shorter.")


def image_latents(encode: Encode, image: Tensor, size: ClipSize, title: str) -> Tensor:
    """Latents of an image of the clip's size, as a video of one frame: [3, height, width] to [C, 1, H, W].

    Args:
        encode: the VAE. image: pixels in [-1, 1]. size: of the clip. title: what to call the image.

    Raises:
        ConfigError: CFG-254 for an image of another size or not of RGB, CFG-256 for pixels of another kind.
    """
    require_image(image, title)
    if tuple(image.shape[1:]) != (size.height, size.width):
        height, width = image.shape[1:]
        message = f"{title} is {height}x{width} pixels, the clip {size.height}x{size.width}."
        raise ConfigError("CFG-254", message, "Resize and crop it as the clip.")
    return encode(image[None, :, None])[0]


def require_image(image: Tensor, title: str) -> None:
    """Refuse what is no image of RGB, [3, height, width]: CFG-254, and CFG-256 as `require_pixels`."""
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        channels = {1: ", grey", 2: ", grey with alpha", 4: ", with alpha"}.get(
            image.shape[0] if image.ndim == 3 else 0
        )
        message = f"{title} is {list(image.shape)}{channels or ''}, expected [3, height, width]: red, green, blue."
        raise ConfigError("CFG-254", message, "Convert it to RGB; lay one with alpha over the colour that is meant.")
    require_pixels(image, title)


def require_pixels(pixels: Tensor, title: str) -> None:
    """Refuse pixels that are no floating-point numbers from -1 to 1, with CFG-256."""
    _require_range(pixels, -1, title, "pixels / 127.5 - 1, of pixels from 0 to 255")


def require_mask(mask: Tensor, size: ClipSize) -> None:
    """Refuse a mask that has not one number from 0 to 1 for each pixel of the clip: CFG-252 or CFG-256."""
    wanted = (size.frames, size.height, size.width)
    if tuple(mask.shape) != wanted:
        message = f"The mask is {list(mask.shape)}, the clip's pixels are {list(wanted)}: {size}."
        raise ConfigError("CFG-252", message, "Give a mask for each frame, resized and cropped as the clip.")
    _require_range(mask, 0, "The mask", "mask / 255, of a mask from 0 to 255")


def binarised(mask: Tensor) -> Tensor:
    """1 where a mask is above 0.5, else 0, in its dtype."""
    return (mask > 0.5).to(mask.dtype)


def _require_range(values: Tensor, least: int, title: str, remedy: str) -> None:
    if not values.is_floating_point():
        message = f"{title} is of {str(values.dtype).removeprefix('torch.')}, expected numbers from {least} to 1."
        raise ConfigError("CFG-256", message, f"Give {remedy}.")
    lowest, highest = (float(bound) for bound in values.aminmax())
    if not (least - _ROUNDING <= lowest and highest <= 1 + _ROUNDING):  # false for NaN
        message = f"{title} has numbers from {lowest:g} to {highest:g}, expected {least} to 1."
        raise ConfigError("CFG-256", message, f"Give {remedy}.")
