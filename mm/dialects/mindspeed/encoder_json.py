"""Sections about encoders that several of MindSpeed-MM's files share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.data import MAX_TEXT_TOKENS
from mm.config.model import Precision
from mm.config.run.encoders import LatentPixels, Tiles
from mm.config.unread import built


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

    def tiles(self) -> Tiles | None:
        """The sizes of tiles, where they are said."""
        given = self.tiling_param
        return None if given is None else built(Tiles, {"size": given.tile_size, "stride": given.tile_stride})


class TextEncoderConfig(Section):
    """The UMT5 text encoder: its folder in the transformers layout and its precision."""

    model_id: Literal["UMT5"] = "UMT5"
    hub_backend: Literal["hf"] = "hf"
    from_pretrained: str = Field(min_length=1)
    dtype: Precision


class TokenizerConfig(Section):
    """The tokenizer. In training it is optional and only compared with the one the features were made with.

    Attributes:
        from_pretrained: folder of the tokenizer.
        model_max_length: tokens after which a caption is cut.
    """

    hub_backend: Literal["hf"] = "hf"
    autotokenizer_name: Literal["AutoTokenizer"] = "AutoTokenizer"
    from_pretrained: str = Field(min_length=1)
    model_max_length: int = Field(MAX_TEXT_TOKENS, ge=1, le=MAX_TEXT_TOKENS)
