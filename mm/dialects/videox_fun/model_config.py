"""config/wan2.1/wan_civitai.yaml: where the parts of a model lie in its folder, and the schedule of noise levels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mm.config.base import Section, parse
from mm.config.yaml_file import load_yaml

T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


class Transformer(Section):
    """The transformer. `dict_mapping` renames keys of config.json for a class that is not here."""

    transformer_subpath: str = "./"
    dict_mapping: Any = None


class Vae(Section):
    """The video VAE."""

    vae_subpath: str = "Wan2.1_VAE.pth"
    temporal_compression_ratio: Literal[4] = 4
    spatial_compression_ratio: Literal[8] = 8


class TextEncoder(Section):
    """The text encoder and its tokenizer; its sizes are those of the released one, which its file has."""

    text_encoder_subpath: str = T5_FILE
    tokenizer_subpath: str = "google/umt5-xxl"
    text_length: int = Field(512, ge=1, le=512)
    vocab: Any = None
    dim: Any = None
    dim_attn: Any = None
    dim_ffn: Any = None
    num_heads: Any = None
    num_layers: Any = None
    num_buckets: Any = None
    shared_pos: Any = None
    dropout: Any = None


class ImageEncoder(Section):
    """The image encoder."""

    image_encoder_subpath: str = CLIP_FILE


class Scheduler(Section):
    """Noise levels; a shift that depends on a sample's size is not here."""

    scheduler_subpath: Any = None
    num_train_timesteps: int = Field(1000, ge=2)
    shift: float = Field(5.0, gt=0)
    use_dynamic_shifting: Literal[False] = False
    base_shift: Any = None
    max_shift: Any = None
    base_image_seq_len: Any = None
    max_image_seq_len: Any = None


class ModelConfig(Section):
    """The file; without one the values of the released models."""

    format: Literal["civitai"] = "civitai"
    pipeline: str = "Wan"
    transformer_additional_kwargs: Transformer = Transformer()
    vae_kwargs: Vae = Vae()
    text_encoder_kwargs: TextEncoder = TextEncoder()
    image_encoder_kwargs: ImageEncoder = ImageEncoder()
    scheduler_kwargs: Scheduler = Scheduler()


def load_model_config(path: str | None) -> ModelConfig:
    """Read the file; None gives the values of the released models.

    Raises:
        ConfigError: CFG-001 to CFG-005 for what cannot be read; all at once.
    """
    return ModelConfig() if path is None else parse(ModelConfig, load_yaml(Path(path)), path)


def part_of(model: str, subpath: str, diffusers: str) -> str | None:
    """Place of a part of a model: where the file says it is, or in a folder of diffusers' name; None for neither.

    Args:
        model: the folder. subpath: of the part in it. diffusers: the part's folder in diffusers' layout.
    """
    places = (os.path.join(model, subpath), os.path.join(model, diffusers))
    return next((place for place in places if os.path.exists(place)), None)
