"""The encoders around the transformer, as extraction and generation name them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mm.config.base import Section
from mm.config.data import MAX_TEXT_TOKENS
from mm.config.model import Precision

LatentPixels = Annotated[int, Field(ge=1)]


TileBlend = Literal["neighbours", "masks"]
"""Ways to put tiles together: each is faded into the one above and the one to its left, as diffusers does, or all are
weighted by masks, as DiffSynth-Studio does."""


class Tiles(Section):
    """Overlapping tiles of a large frame, blended linearly where they overlap. Saves memory, costs time.

    Attributes:
        size: height and width of a tile in latent pixels (8 image pixels each).
        stride: distance between the origins of neighbouring tiles, in latent pixels.
    """

    size: tuple[LatentPixels, LatentPixels] = (34, 34)
    stride: tuple[LatentPixels, LatentPixels] = (18, 16)


class VideoEncoderSection(Section):
    """The video VAE. Latents are the posterior's mode, shifted and scaled by its own numbers for each channel.

    Attributes:
        from_pretrained: its folder in the diffusers layout. precision: of weights and latents.
        tiling: work in tiles instead of whole frames.
        condition_tiling: encode known frames in tiles; None does as `tiling` says.
        tiles: their sizes, where any are used.
    """

    from_pretrained: str = Field(min_length=1)
    precision: Precision
    tiling: bool = False
    condition_tiling: bool | None = None
    tiles: Tiles | None = None

    def tiles_of_clips(self) -> Tiles | None:
        """The tiles to work in, or None for whole frames."""
        return (self.tiles or Tiles()) if self.tiling else None

    def tiles_of_conditions(self) -> Tiles | None:
        """The tiles to encode the known frames in, or None for whole frames."""
        in_tiles = self.tiling if self.condition_tiling is None else self.condition_tiling
        return (self.tiles or Tiles()) if in_tiles else None


class TextEncoderSection(Section):
    """The UMT5 text encoder: its folder in the transformers layout, and its precision."""

    from_pretrained: str = Field(min_length=1)
    precision: Precision


class TokenizerSection(Section):
    """The text encoder's tokenizer: its folder, and the tokens after which a caption is cut."""

    from_pretrained: str = Field(min_length=1)
    model_max_length: int = Field(MAX_TEXT_TOKENS, ge=1, le=MAX_TEXT_TOKENS)


class ImageEncoderSection(Section):
    """CLIP's visual half, in tasks with given frames: its folder in the transformers layout, and its precision.

    Attributes:
        precision: None takes the VAE's.
    """

    from_pretrained: str = Field(min_length=1)
    precision: Precision | None = None


class EncodersSection(Section):
    """All encoders."""

    vae: VideoEncoderSection
    text: TextEncoderSection
    tokenizer: TokenizerSection
    image: ImageEncoderSection | None = None

    @property
    def image_precision(self) -> Precision:
        """Precision of the image encoder."""
        own = self.image.precision if self.image is not None else None
        return own or self.vae.precision
