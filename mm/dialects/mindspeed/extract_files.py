"""Flags of feature extraction, and its files beside data.json: model_wan.json (encoders), tools.json (where to)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.flags import Flags
from mm.config.tasks.registry import FeatureTaskName
from mm.dialects.mindspeed.encoder_json import AutoencoderConfig, TextEncoderConfig
from mm.dialects.mindspeed.flag_paths import sets


class ImageProcessor(Section):
    """`ae.i2v_processor`: how known frames are encoded, in tasks that have some.

    Attributes:
        image_encoder: folder of CLIP's visual half in the transformers layout; it works in the VAE's precision.
        i2v_vae_encode_tiling: whether the VAE encodes the known frames in tiles; `auto` does it where it does the clip.
    """

    processor_id: Literal["wan_i2v_processor"] = "wan_i2v_processor"
    image_encoder: str = Field(min_length=1)
    i2v_vae_encode_tiling: bool | Literal["auto"] = "auto"


class ExtractAutoencoder(AutoencoderConfig):
    """The `ae` section of feature extraction.

    Attributes:
        i2v_processor: with images only.
    """

    i2v_processor: ImageProcessor | None = None


class ExtractModel(Section):
    """`feature_extract/model_wan.json`. `task` may be said here, in tools.json, or in both."""

    task: FeatureTaskName | None = None
    ae: ExtractAutoencoder
    text_encoder: TextEncoderConfig


class SoraFeature(Section):
    """Target of features: `save_path`, one safetensors file a sample."""

    save_path: str = Field(min_length=1)
    extract_video_feature: Literal[True] = True
    extract_text_feature: Literal[True] = True
    data_storage_mode: Literal["sorafeatured"] = "sorafeatured"


class ExtractTools(Section):
    """`feature_extract/tools.json`. `task` may be said here, in model_wan.json, or in both."""

    sorafeature: SoraFeature
    task: FeatureTaskName | None = None


class ExtractFlags(Flags):
    """Encode videos and captions to features, once, for training. Start it with torchrun for several processes."""

    may_be_empty = frozenset({"negative_caption"})

    mm_data: str = Field(description="data.json: which videos, and what clip to take of each")
    mm_model: str = Field(description="model_wan.json: the encoders")
    mm_tool: str = Field(description="tools.json: the folder to write to")
    seed: int = sets(
        "extraction.seed",
        1234,
        ge=0,
        description="seed of the clip's start in a longer video and of the caption in a list",
    )
    num_workers: int = sets(
        "data.workers", 2, ge=1, description="videos that each process reads ahead, in processes of their own"
    )
    decode_timeout: float = sets(
        "data.read_timeout", 120.0, gt=0, description="seconds to read one clip; a decoder that hangs is ended"
    )
    on_bad_sample: str = sets(
        "data.on_bad_sample", "fail", description="a clip that cannot be read: fail, or skip:max=0.1% of all clips"
    )
    overwrite: bool = sets("output.overwrite", False, description="replace features that were made with another recipe")
    device: Literal["cpu", "cuda", "npu"] | None = sets(
        "extraction.device", None, description="kind of device; default: the best there is"
    )
    draws: int = sets(
        "extraction.draws", 1, ge=1, description="clips of each sample, each with another start, crop and caption"
    )
    shard_rows: int | None = sets(
        "extraction.shard_rows", None, ge=1, description="rows of a shard; default: about 512 MB, of small tables less"
    )
    shard_of: str | None = sets(
        "extraction.shard_of", None, description="make only a part of the shards: 37/200 is the 37th of 200 parts"
    )
    negative_caption: str | None = sets(
        "extraction.negative_caption",
        None,
        description="negative prompt of clips that a training renders, to be stored once; release: Wan2.1's own",
    )
    clip_prompts: str | None = sets(
        "extraction.clip_prompts", None, description="text file, one prompt a line, of such clips, to be stored as well"
    )
    distributed_timeout_minutes: int = sets(
        "supervision.timeout_minutes", 1440, ge=1, description="how long to wait for a process that plans the shards"
    )


RETIRED_EXTRACT_FLAGS = dict.fromkeys(
    (
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--context-parallel-size",
        "--micro-batch-size",
        "--global-batch-size",
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--max-position-embeddings",
        "--tokenizer-type",
        "--vocab-size",
        "--position-embedding-type",
        "--lr",
        "--train-iters",
        "--bf16",
        "--distributed-backend",
    ),
    "Remove it; each process encodes one sample at a time, and model_wan.json says in which precision.",
)
