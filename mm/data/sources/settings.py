"""Settings of a source that its metadata carry beside the samples: weights for the sampling plan, wishes about shapes.

Numbers keep the units of the file that says them; `mm.data.sources` computes nothing from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ResolutionType = Literal["pixel", "area", "pixel_area"]


@dataclass(frozen=True, slots=True)
class ShapeWishes:
    """Size and length that a source asks for its samples; what it does not say is None.

    Attributes:
        resolution, resolution_type: of the target: its shorter edge (`pixel`), megapixels (`area`), or the edge of the
            square of equal area (`pixel_area`).
        minimum_image_size: what is smaller is left out; `maximum_image_size`: what is larger is first made as large as
            `target_downsample_size`; all three in the unit of `resolution_type`.
        max_upscale: the most that a sample is made larger.
        crop: cut the picture to `crop_aspect`; otherwise only what is left over at the edges of its bucket.
        crop_style: where it is cut. crop_aspect: which shape comes out.
        aspect_buckets: width by height and weight of the shapes that `closest` and `random` choose from.
        minimum_aspect, maximum_aspect: width by height; what lies outside is left out.
        bucket_strategy: buckets are aspects, or sizes with frames.
        num_frames: that are trained on. min_frames, max_frames: what is shorter or longer is left out.
        frame_interval: numbers of frames are multiples of it, before they are made 4k + 1.
    """

    resolution: float | None = None
    resolution_type: ResolutionType = "pixel_area"
    minimum_image_size: float | None = None
    maximum_image_size: float | None = None
    target_downsample_size: float | None = None
    max_upscale: float | None = None
    crop: bool = False
    crop_style: Literal["random", "center", "corner", "face"] = "random"
    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    aspect_buckets: tuple[tuple[float, float], ...] = ()
    minimum_aspect: float | None = None
    maximum_aspect: float | None = None
    bucket_strategy: Literal["aspect_ratio", "resolution_frames"] = "aspect_ratio"
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    frame_interval: int | None = None


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """Settings of one source.

    Attributes:
        id: its name, where its metadata give one.
        repeats: passes through it in an epoch beside the first.
        probability: its weight where sources are drawn from.
        max_num_samples: the most of its samples that are used.
        start_epoch, start_step, end_epoch, end_step: when it is trained on, counted from 1 and from 0; an end of 0 is
            none.
        batch_size: samples of it in a micro-batch.
        is_regularisation: its loss is the distance from the frozen base.
        first_frame_is_given: of each clip.
        shape: of its samples.
    """

    id: str = ""
    repeats: int = 0
    probability: float = 1.0
    max_num_samples: int | None = None
    start_epoch: int = 1
    start_step: int = 0
    end_epoch: int = 0
    end_step: int = 0
    batch_size: int | None = None
    is_regularisation: bool = False
    first_frame_is_given: bool = False
    shape: ShapeWishes | None = None


NO_SETTINGS = SourceSettings()
