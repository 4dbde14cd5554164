"""Fields of the entries of SimpleTuner's multidatabackend.json.

An entry is a source of samples (`image`, `video`), of files beside them (`conditioning`), or a store of what
SimpleTuner makes of captions and images. The features here hold both in one store, so that those entries say nothing
more than that they are there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.run.shapes import LARGEST_SIDE

ResolutionType = Literal["pixel", "area", "pixel_area"]
STORES = ("text_embeds", "image_embeds", "conditioning_image_embeds")
SAMPLES = ("image", "video")


class AspectBucket(Section):
    """A shape that pictures may be cut to: width by height, and its share."""

    aspect: float = Field(gt=0)
    weight: float = Field(gt=0)


class VideoFields(Section):
    """Field `video` of an entry."""

    num_frames: int | None = Field(None, ge=1)
    min_frames: int | None = Field(None, ge=1)
    max_frames: int | None = Field(None, ge=1)
    bucket_strategy: Literal["aspect_ratio", "resolution_frames"] = "aspect_ratio"
    frame_interval: int | None = Field(None, ge=1)
    is_i2v: bool | None = None


class ParquetFields(Section):
    """Field `parquet` of an entry: a table of captions, by file name.

    Attributes:
        path: the table, below the folder that entries start from.
        filename_column, caption_column: columns of files and captions. fallback_caption_column: where that is empty.
        identifier_includes_extension: file names in it have their endings.
        width_column, height_column: sizes, which are read from the files.
    """

    path: str = Field(min_length=1)
    filename_column: str = "id"
    caption_column: str = "caption"
    fallback_caption_column: str | None = None
    identifier_includes_extension: bool = False
    width_column: str | None = None
    height_column: str | None = None


class Entry(Section):
    """One entry. Names and defaults are SimpleTuner's.

    The last lines are about how SimpleTuner caches and reads, on which nothing here depends.
    """

    id: str = Field(min_length=1, pattern=r"^[^/\x00]+$")
    type: Literal["local", "aws", "csv", "huggingface", "memory", "webshart"] = "local"
    dataset_type: Literal[
        "image",
        "video",
        "audio",
        "caption",
        "eval",
        "conditioning",
        "text_embeds",
        "image_embeds",
        "conditioning_image_embeds",
    ] = "image"
    disabled: bool = False
    disable: bool = False
    default: bool = False

    instance_data_dir: str | None = Field(None, min_length=1)
    caption_strategy: Literal["textfile", "filename", "instanceprompt", "parquet", "huggingface", "webshart"] = (
        "filename"
    )
    instance_prompt: str | None = None
    prepend_instance_prompt: bool = False
    only_instance_prompt: bool = False
    disable_multiline_split: bool = False
    caption_filter_list: str | list[str] | None = None
    caption_shuffle: dict[str, Any] | None = None
    parquet: ParquetFields | None = None
    metadata_backend: Literal["discovery", "parquet", "huggingface"] = "discovery"

    resolution: float | None = Field(None, gt=0, le=LARGEST_SIDE)
    resolution_type: ResolutionType = "pixel_area"
    minimum_image_size: float | None = Field(None, ge=0, le=LARGEST_SIDE)
    maximum_image_size: float | None = Field(None, gt=0, le=LARGEST_SIDE)
    target_downsample_size: float | None = Field(None, gt=0, le=LARGEST_SIDE)
    max_upscale_threshold: float | None = Field(None, gt=0)
    crop: bool = False
    crop_style: Literal["random", "center", "corner", "face"] = "random"
    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    crop_aspect_buckets: tuple[float | AspectBucket, ...] = ()
    minimum_aspect_ratio: float | None = Field(None, gt=0)
    maximum_aspect_ratio: float | None = Field(None, gt=0)
    video: VideoFields | None = None

    repeats: int = Field(0, ge=0, le=10**9)
    probability: float = Field(1.0, ge=0)
    max_num_samples: int | None = Field(None, ge=1)
    start_epoch: int = Field(1, ge=1, le=10**9)
    start_step: int = Field(0, ge=0)
    end_epoch: int | None = Field(None, ge=0, le=10**9)
    end_step: int | None = Field(None, ge=0)
    train_batch_size: int | None = Field(None, ge=1)
    is_regularisation_data: bool = False

    conditioning_data: str | list[str] | None = None
    source_dataset_id: str | None = None
    conditioning_type: str | None = None
    text_embeds: str | None = None
    image_embeds: str | None = None
    conditioning_image_embeds: str | None = None

    aws_bucket_name: str | None = Field(None, min_length=1)
    aws_data_prefix: str | None = None
    aws_endpoint_url: str | None = None
    aws_region_name: str | None = None
    aws_access_key_id: str | None = None
    aws_secret_access_key: str | None = None

    cache_dir: str | None = None
    cache_dir_vae: str | None = None
    cache_dir_conditioning_image_embeds: str | None = None
    write_batch_size: int | None = Field(None, ge=1)
    read_batch_size: int | None = Field(None, ge=1)
    image_processing_batch_size: int | None = Field(None, ge=1)
    vae_batch_size: int | None = Field(None, ge=1)
    text_encoder_batch_size: int | None = Field(None, ge=1)
    max_workers: int | None = Field(None, ge=1)
    vae_cache_ondemand: bool = False
    vae_cache_disable: bool = False
    vae_cache_clear_each_epoch: bool = False
    vae_cache_scan_behaviour: Literal["recreate", "sync"] = "recreate"
    text_cache_ondemand: bool = False
    text_cache_disable: bool = False
    scan_for_errors: bool = False

    @property
    def is_off(self) -> bool:
        """True where it is left out."""
        return self.disabled or self.disable

    @property
    def conditions(self) -> tuple[str, ...]:
        """Entries that hold files beside those of this one."""
        given = self.conditioning_data or ()
        return (given,) if isinstance(given, str) else tuple(given)
