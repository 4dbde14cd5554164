"""Shape rules: the size that each sample is encoded at where it is not one size for all, and which frames it gets.

A rule says what is done, in pixels and frames; `mm.data.shapes` does it. Sizes are those of the picture as it is shown.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section

SMALLEST_SIDE = 32  # of ratio buckets: below it one has a side of less than a token
LARGEST_SIDE = 16384  # that a picture may have; no size is larger


class RatioBuckets(Section):
    """The nearest of VideoX-Fun's 40 ratios, at about the area of a square of `side`.

    Attributes:
        side: of videos. image_side: of images (clips of one frame); default `side`.
        vary_side: take a smaller side now and then, by VideoX-Fun's list for the size (`random_hw_adapt`).
        full_share: share of samples that keep the whole side then.
        random_ratio: draw one of 15 ratios instead of the nearest (`random_ratio_crop`).
    """

    rule: Literal["ratio_buckets"]
    side: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    image_side: int | None = Field(None, ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    vary_side: bool = False
    full_share: float = Field(0.9, gt=0, le=1)
    random_ratio: bool = False


class TokenLength(Section):
    """VideoX-Fun's buckets at a drawn side, with as many frames as `num_frames` at `token_side` have pixels.

    Attributes:
        min_side, max_side: between which sides are drawn, 128 apart; images take VideoX-Fun's smaller sides of
            `max_side` as `RatioBuckets.vary_side` does.
        token_side: side at which a clip has all `num_frames`.
        token_side_share: share of videos that take the side nearest to `token_side`, the rest as `even`; None: all
            sides are alike.
        full_share: share of images that keep `max_side`.
        random_ratio: as in `RatioBuckets`.
    """

    rule: Literal["token_length"]
    min_side: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    max_side: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    token_side: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    token_side_share: float | None = Field(None, gt=0, lt=1)
    full_share: float = Field(0.9, gt=0, le=1)
    random_ratio: bool = False


class AspectWeight(Section):
    """An aspect, width by height, and the share of samples that are cropped to it."""

    aspect: float = Field(gt=0)
    weight: float = Field(gt=0)


class Resolution(Section):
    """SimpleTuner's size: the picture's own aspect, or one that is cropped to, at one edge or area, aligned.

    Attributes:
        rule: unit of `resolution` and of the three sizes: `pixel`, the shorter edge; `area`, megapixels; `pixel_area`,
            the edge of the square of that area.
        resolution: the size.
        alignment: sides are multiples of it. rounding: decimals of the aspect, so how many buckets there are.
        minimum_image_size: smaller samples are left out.
        maximum_image_size, target_downsample_size: with `crop`, a larger sample is made as small as the second first.
        max_upscale_threshold: most that a side may grow, 0.2 for a fifth; what has to grow more is left out.
        minimum_aspect_ratio, maximum_aspect_ratio: of samples that are not left out, width by height.
        crop: take a part of the picture in place of all of it.
        crop_style: the part's place. crop_aspect: its aspect; one of `crop_aspect_buckets` for `closest`, `random`.
    """

    rule: Literal["pixel", "area", "pixel_area"]
    resolution: float = Field(gt=0, le=LARGEST_SIDE)
    alignment: int = Field(32, ge=1, le=LARGEST_SIDE)
    rounding: int = Field(2, ge=1, le=9)
    minimum_image_size: float | None = Field(None, gt=0, le=LARGEST_SIDE)
    maximum_image_size: float | None = Field(None, gt=0, le=LARGEST_SIDE)
    target_downsample_size: float | None = Field(None, gt=0, le=LARGEST_SIDE)
    max_upscale_threshold: float | None = Field(None, ge=0)
    minimum_aspect_ratio: float = Field(0.25, gt=0)
    maximum_aspect_ratio: float = Field(4.0, gt=0)
    crop: bool = False
    crop_style: Literal["random", "center", "corner"] = "random"
    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    crop_aspect_buckets: tuple[float | AspectWeight, ...] = ()


class MaxPixels(Section):
    """DiffSynth's dynamic resolution: the picture's own size where it is not too large, cropped to multiples.

    Attributes:
        max_pixels: area that a larger picture is made as small as. multiple: of the sides.
    """

    rule: Literal["max_pixels"]
    max_pixels: int = Field(ge=256, le=LARGEST_SIDE**2)
    multiple: int = Field(16, ge=1, le=LARGEST_SIDE)


ShapeRule = RatioBuckets | TokenLength | Resolution | MaxPixels


class FrameRule(Section):
    """Choice of frames of a video, beyond how many and every how-manieth.

    Attributes:
        start: where in a longer video: drawn, or at its first frame (that of its `cut`).
        fps: frames a second, chosen by time stamps; None takes the frames as they come.
        shorter_share: share of clips that get fewer frames, 4k + 1 (VideoX-Fun's `random_frame_crop`: 0.1).
        length_multiple: of the frames of a video that is shorter than `num_frames`, so that there are few lengths
            (SimpleTuner's `frame_interval` of `resolution_frames`).
        max_frames: videos of more frames are left out.
    """

    start: Literal["random", "first"] = "random"
    fps: float | None = Field(None, gt=0)
    shorter_share: float = Field(0.0, ge=0, lt=1)
    length_multiple: int | None = Field(None, ge=1)
    max_frames: int | None = Field(None, ge=1)
