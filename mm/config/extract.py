"""Files of feature extraction beside data.json: `model_wan.json` (encoders) and `tools.json` (where features go)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mm.config.base import Section, load
from mm.config.flags import Flags
from mm.config.model import Precision
from mm.errors import ConfigError, Problem, raise_all

LatentPixels = Annotated[int, Field(ge=1)]


class TilingParam(Section):
    """Encode large frames in overlapping tiles, blended linearly where they overlap. Saves memory, costs time.

    Attributes:
        tile_size: height and width of a tile in latent pixels (8 image pixels each).
        tile_stride: distance between the origins of neighbouring tiles, in latent pixels.
    """

    tile_size: tuple[LatentPixels, LatentPixels] = (34, 34)
    tile_stride: tuple[LatentPixels, LatentPixels] = (18, 16)


class AutoencoderConfig(Section):
    """The video VAE.

    Attributes:
        from_pretrained: its folder in the diffusers layout. dtype: precision of weights and latents.
        norm_latents, norm_mode: latents are shifted and scaled by the VAE's own per-channel mean and deviation.
        do_sample: false means the posterior's mode, so that the same video gives the same latents.
    """

    model_id: Literal["wan_video_vae"] = "wan_video_vae"
    from_pretrained: str = Field(min_length=1)
    dtype: Precision
    enable_tiling: bool = False
    tiling_param: TilingParam | None = None
    norm_latents: Literal[True] = True
    norm_mode: Literal["channel_specified_shift_scale"] = "channel_specified_shift_scale"
    do_sample: Literal[False] = False

    def tiling(self) -> TilingParam | None:
        """The tiles to encode in, or None for whole frames."""
        return (self.tiling_param or TilingParam()) if self.enable_tiling else None


class TextEncoderConfig(Section):
    """The UMT5 text encoder: its folder in the transformers layout and its precision."""

    model_id: Literal["UMT5"] = "UMT5"
    hub_backend: Literal["hf"] = "hf"
    from_pretrained: str = Field(min_length=1)
    dtype: Precision


class ExtractModel(Section):
    """`feature_extract/model_wan.json`."""

    task: Literal["t2v"] = "t2v"
    ae: AutoencoderConfig
    text_encoder: TextEncoderConfig


class SoraFeature(Section):
    """Where features go: `save_path`, one safetensors file a sample."""

    save_path: str = Field(min_length=1)
    extract_video_feature: Literal[True] = True
    extract_text_feature: Literal[True] = True
    data_storage_mode: Literal["sorafeatured"] = "sorafeatured"


class ExtractTools(Section):
    """`feature_extract/tools.json`."""

    sorafeature: SoraFeature
    task: Literal["t2v"] = "t2v"


class ExtractFlags(Flags):
    """Encode videos and captions to features, once, for training. Start it with torchrun for several processes."""

    mm_data: str = Field(description="data.json: which videos, and what clip to take of each")
    mm_model: str = Field(description="model_wan.json: the encoders")
    mm_tool: str = Field(description="tools.json: the folder to write to")
    seed: int = Field(1234, ge=0, description="seed of the clip's start in a longer video and of the caption in a list")
    num_workers: int = Field(2, ge=1, description="videos that each process reads ahead")
    overwrite: bool = Field(False, description="replace features that were made with another recipe")
    device: Literal["cpu", "cuda", "npu"] | None = Field(None, description="kind of device; default: the best there is")
    distributed_timeout_minutes: int = Field(1440, ge=1, description="how long a process waits for slower ones")


def load_extract_model(path: Path) -> ExtractModel:
    """Read and check model_wan.json.

    Raises:
        ConfigError: what `mm.config.base.load` raises, CFG-055 for tiles that cannot work; all at once.
    """
    model = load(ExtractModel, path)
    raise_all(ConfigError, list(_impossible_tiles(model.ae, str(path))))
    return model


def load_extract_tools(path: Path) -> ExtractTools:
    """Read and check tools.json; raises what `mm.config.base.load` raises."""
    return load(ExtractTools, path)


def _impossible_tiles(ae: AutoencoderConfig, source: str) -> Iterator[Problem]:
    if ae.tiling_param is not None and not ae.enable_tiling:
        yield Problem(
            "CFG-055",
            f"{source}: ae.tiling_param has no effect while ae.enable_tiling is false.",
            "Remove it or set enable_tiling to true.",
        )
    tiling = ae.tiling_param or TilingParam()
    for axis, size, stride in zip(("height", "width"), tiling.tile_size, tiling.tile_stride, strict=True):
        if stride > size:
            yield Problem(
                "CFG-055",
                f"{source}: tiles of {axis} {size} every {stride} latent pixels leave gaps.",
                "Give a tile_stride of at most tile_size.",
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
