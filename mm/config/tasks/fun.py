"""Parts shared by the tasks of VideoX-Fun's models that are controlled: an image's features, and channels of latents.

Shapes: C latent channels, F H W latent frames, height and width. Source: VideoX-Fun's released models.
"""

from __future__ import annotations

from mm.config.tasks.frames import RECIPE as RECIPE
from mm.config.tasks.frames import SIZES as SIZES
from mm.config.tasks.frames import image_tokens
from mm.config.tasks.task import Entry, InputFeature, Media, Shape, Sizes, Source

PIXELS_OF_A_LATENT = 8
"""Rows and columns of pixels that the VAE puts into one of a latent."""


CONTROL = Media("control", "video", listed="controls")
START = Media("first_frame", "image", listed="images", required=False, from_clip="first frame")


def _control_and_start(sizes: Sizes) -> dict[str, int]:
    return {"control": sizes.channels, "start": sizes.channels}


def _control_condition(sizes: Sizes) -> Shape:
    return sum(_control_and_start(sizes).values()), *sizes.latent


def _start_condition(sizes: Sizes) -> Shape:
    return sizes.channels, *sizes.latent


_IMAGE = image_tokens(1)
CONTROL_FEATURES = (
    _IMAGE,
    InputFeature(
        name="condition",
        title="Condition latents",
        source=Source.CONTROL_VIDEO,
        entry=Entry.CHANNELS,
        shape=_control_condition,
        parts=_control_and_start,
        dropped_as=("control", "start"),
        error="CFG-059",
        remedy="Give the control video's latents and behind their channels those of the start image (zeros after its "
        "frame, or everywhere), in the size of the noisy latents.",
    ),
)
START_FEATURES = (
    _IMAGE,
    InputFeature(
        name="condition",
        title="Condition latents",
        source=Source.START_IMAGE,
        entry=Entry.CHANNELS,
        shape=_start_condition,
        parts=lambda sizes: {"start": sizes.channels},
        dropped_as=("start",),
        error="CFG-059",
        remedy="Give the start image's latents, zeros after its frame, in the size of the noisy latents.",
    ),
)
