"""The frozen models around the transformer, as folders or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mm.config.data import MAX_TEXT_TOKENS
from mm.config.model import Precision
from mm.config.run.encoders import TileBlend, Tiles
from mm.errors import ConfigError
from mm.wan.encoders import TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder

Folder = str | Path
AnyEncoder = VideoEncoder | TextEncoder | ImageEncoder
EncoderT = TypeVar("EncoderT", VideoEncoder, TextEncoder, ImageEncoder)


@dataclass(frozen=True)
class Encoders:
    """The models around a transformer. What is loaded is used as it is; of a folder it is loaded for each call.

    Attributes:
        vae: the video VAE, a folder in the diffusers layout.
        text_encoder: UMT5, a folder in the transformers layout. tokenizer: its folder, where that is not loaded.
        image_encoder: CLIP's visual half, for tasks with given frames.
        text_dtype, visual_dtype: of the text encoder, and of the VAE and the image encoder, where a folder is loaded.
        tiling: the VAE works in overlapping tiles, which saves memory and costs time: True, or their sizes.
        tile_blend: the way in which tiles are put together.
        wait: those that are loaded wait on the CPU, and are on the device only while they are needed.
    """

    vae: Folder | VideoEncoder
    text_encoder: Folder | TextEncoder
    tokenizer: Folder | None = None
    image_encoder: Folder | ImageEncoder | None = None
    text_dtype: Precision = "bf16"
    visual_dtype: Precision = "fp32"
    tiling: bool | Tiles = False
    tile_blend: TileBlend = "neighbours"
    wait: bool = False

    @classmethod
    def of(
        cls,
        folder: Folder,
        *,
        text_dtype: Precision = "bf16",
        visual_dtype: Precision = "fp32",
        tiling: bool | Tiles = False,
        tile_blend: TileBlend = "neighbours",
    ) -> Encoders:
        """Those of a model's folder in the diffusers layout: `vae`, `text_encoder`, `tokenizer`, `image_encoder`."""
        home = Path(folder)
        image = home / "image_encoder"
        return cls(
            home / "vae",
            home / "text_encoder",
            home / "tokenizer",
            image if image.is_dir() else None,
            text_dtype,
            visual_dtype,
            tiling,
            tile_blend,
        )

    def load_vae(self, device: torch.device) -> VideoEncoder:
        """The VAE; DATA-040 to DATA-042 where it cannot be loaded."""
        if isinstance(self.vae, VideoEncoder):
            return self._come(self.vae, device)
        tiles = self.tiling if isinstance(self.tiling, Tiles) else Tiles() if self.tiling else None
        return VideoEncoder.from_pretrained(Path(self.vae), self.visual_dtype, device, tiles, self.tile_blend)

    def load_text_encoder(self, device: torch.device, max_tokens: int = MAX_TEXT_TOKENS) -> TextEncoder:
        """The text encoder, which cuts texts at so many tokens; DATA-040 to DATA-043 where it cannot be loaded.

        Raises:
            ConfigError: CFG-200 for a folder without its tokenizer.
        """
        if isinstance(self.text_encoder, TextEncoder):
            return self._come(self.text_encoder, device)
        if self.tokenizer is None:
            raise ConfigError("CFG-200", f"{self.text_encoder} has no tokenizer.", "Give tokenizer= beside it.")
        folders = Path(self.text_encoder), Path(self.tokenizer)
        return TextEncoder.from_pretrained(*folders, self.text_dtype, device, max_tokens)

    def load_image_encoder(self, device: torch.device) -> ImageEncoder:
        """The image encoder; DATA-040 to DATA-042 where it cannot be loaded.

        Raises:
            ConfigError: CFG-200 where there is none.
        """
        if isinstance(self.image_encoder, ImageEncoder):
            return self._come(self.image_encoder, device)
        if self.image_encoder is None:
            message = "The task has frames that are given, and there is no image encoder."
            raise ConfigError("CFG-200", message, "Give image_encoder=, the folder of that name of an I2V model.")
        return ImageEncoder.from_pretrained(Path(self.image_encoder), self.visual_dtype, device)

    def leave(self, encoder: AnyEncoder) -> None:
        """Take an encoder off the device that was loaded before, where such wait."""
        if self.wait:
            encoder.to(torch.device("cpu"))

    def _come(self, encoder: EncoderT, device: torch.device) -> EncoderT:
        if self.wait:
            encoder.to(device)
        return encoder


def name_of(encoder: object, kind: str) -> str:
    """Name of an encoder in messages: its folder, or its kind."""
    return str(encoder) if isinstance(encoder, (str, Path)) else f"The {kind}"
