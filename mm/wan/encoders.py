"""The frozen encoders around the transformer: Wan's video VAE (diffusers) and the UMT5 text encoder (transformers).

Both are loaded from local folders only, and only when every weight has its place.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import ftfy
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import UMT5EncoderModel

from mm.config.data import LATENT_PIXELS, TEMPORAL_STRIDE
from mm.config.model import Precision
from mm.config.run.encoders import TileBlend, Tiles
from mm.config.tasks.task import Task
from mm.device.precision import true_fp32
from mm.errors import DataError
from mm.wan.component import load_strictly
from mm.wan.tile_masks import in_masked_tiles
from mm.wan.tiles import in_tiles
from mm.wan.tokenizer import TextTokenizer, open_tokenizer

log = logging.getLogger(__name__)

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VideoEncoder:
    """Wan's causal video VAE, both ways, between pixels and the normalised latents the transformer works on.

    Latents are the posterior's mode, shifted and scaled per channel by the `latents_mean` and `latents_std` of the
    VAE's own configuration, so the same video always gives the same latents (Wan2.1 report, arXiv 2503.20314).

    Attributes:
        spatial_stride: pixels per latent pixel: 8, or 16 of Wan2.2's TI2V-5B, which first makes channels of 2x2.
    """

    def __init__(self, vae: AutoencoderKLWan, tiling: Tiles | None = None, blend: TileBlend = "neighbours") -> None:
        """Take a loaded VAE.

        Args:
            vae: on its device and in its precision.
            tiling: work in overlapping tiles instead of whole frames. Encoders of one VAE may have different ones.
            blend: the way in which tiles are put together.
        """
        self.vae = vae.eval().requires_grad_(False)
        per_channel = (1, -1, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(per_channel)
        self._std = torch.tensor(vae.config.latents_std, device=vae.device).view(per_channel)
        self._tiling, self._blend = tiling, blend
        halvings, patch = len(vae.config.dim_mult) - 1, vae.config.patch_size or 1
        self.spatial_stride = max(2**halvings * patch, LATENT_PIXELS)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path,
        dtype: Precision,
        device: torch.device,
        tiling: Tiles | None = None,
        blend: TileBlend = "neighbours",
    ) -> VideoEncoder:
        """Load the VAE of a folder in the diffusers layout.

        Raises:
            DataError: DATA-040 to DATA-042, see `load_strictly`.
        """
        vae = load_strictly(AutoencoderKLWan, folder, torch_dtype=DTYPES[dtype], low_cpu_mem_usage=False)
        return cls(vae.to(device), tiling, blend)

    def to(self, device: torch.device) -> None:
        """Move the VAE."""
        self.vae.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    @torch.no_grad()
    @true_fp32()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels to normalised latents.

        Args:
            video: [B, 3, F, H, W] in [-1, 1]; F = 4k + 1, H and W multiples of the stride.

        Returns:
            [B, C, (F - 1) / 4 + 1, H / stride, W / stride] in the VAE's precision.

        Raises:
            DataError: DATA-044 when the VAE gives another shape, so that it is no VAE of Wan.
        """
        mode = self._whole_or_tiled(
            lambda pixels: self.vae.encode(pixels).latent_dist.mode(),
            video.to(self.vae.device, self.vae.dtype),
            (self.spatial_stride, 1),
        )
        latents = (mode.float() - self._mean) / self._std
        batch, _, frames, height, width = video.shape
        size = ((frames - 1) // TEMPORAL_STRIDE + 1, height // self.spatial_stride, width // self.spatial_stride)
        expected = (batch, len(self.vae.config.latents_mean), *size)
        if latents.shape != expected:
            message = f"The VAE turned {list(video.shape)} into {list(latents.shape)}, expected {list(expected)}."
            raise DataError("DATA-044", message, "Use the VAE of a Wan model (stride 4x8x8, or 4x16x16).")
        return latents.to(self.vae.dtype)

    @torch.no_grad()
    @true_fp32()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents [B, C, F, H, W] to pixels [B, 3, 4(F - 1) + 1, stride H, stride W] in [-1, 1]."""
        raw = latents.to(self.vae.device).float() * self._std + self._mean
        video = self._whole_or_tiled(
            lambda tile: self.vae.decode(tile).sample, raw.to(self.vae.dtype), (1, self.spatial_stride)
        )
        return video.clamp(-1, 1)

    def _whole_or_tiled(self, apply: Callable[[Tensor], Tensor], x: Tensor, units: tuple[int, int]) -> Tensor:
        if self._tiling is None:
            return apply(x)
        if self._blend == "masks":
            return in_masked_tiles(apply, x, self._tiling, units)
        return in_tiles(self.vae, apply, x, self._tiling, units)


def require_stride(name: str, video: VideoEncoder, task: Task) -> None:
    """Check that a VAE is of the stride of a task's models.

    Raises:
        DataError: DATA-260 for another one.
    """
    found, expected = video.spatial_stride, task.latent_pixels
    if found != expected:
        message = (
            f"{name} has a latent pixel for {found}x{found} pixels, {task.title} models for {expected}x{expected}."
        )
        raise DataError("DATA-260", message, "Use the VAE of the transformer's model.")


class TextEncoder:
    """UMT5 embeddings of captions, cleaned and tokenised as Wan does."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: TextTokenizer, max_length: int = 512) -> None:
        """Take a loaded model and tokenizer.

        Args:
            model: on its device and in its precision.
            tokenizer: its tokenizer.
            max_length: tokens (the closing one included) after which a caption is cut.

        Raises:
            DataError: DATA-043 when the tokenizer knows more tokens than the model.
        """
        if len(tokenizer) > model.config.vocab_size:
            message = f"The tokenizer has {len(tokenizer)} tokens, the text encoder {model.config.vocab_size}."
            raise DataError("DATA-043", message, "Use the tokenizer and the text_encoder of one model.")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_pretrained(
        cls, folder: Path, tokenizer_folder: Path, dtype: Precision, device: torch.device, max_length: int = 512
    ) -> TextEncoder:
        """Load a text encoder and its tokenizer from their folders.

        Raises:
            DataError: DATA-040 to DATA-042 for the weights, see `load_strictly`; DATA-043 and DATA-140 for the
                tokenizer; DATA-120, DATA-121 for either.
        """
        tokenizer = open_tokenizer(tokenizer_folder)
        model = load_strictly(UMT5EncoderModel, folder, dtype=DTYPES[dtype])
        return cls(model.to(device), tokenizer, max_length)

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)

    @torch.no_grad()
    @true_fp32()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions.

        Args:
            captions: any texts; the empty one is a text, too.

        Returns:
            For each caption its embedding [L, D] in the model's precision, L its number of tokens, at most
            `max_length`. A caption that is cut is reported in the log.
        """
        texts = [clean_text(caption) for caption in captions]
        rows = self.tokenizer.ids(texts)
        for text, ids in zip(texts, rows, strict=True):
            if len(ids) > self.max_length:
                log.warning('only %d of %d tokens are used of the caption "%.60s..."', self.max_length, len(ids), text)
        used = [torch.tensor(_cut(ids, self.max_length)) for ids in rows]
        tokens = pad_sequence(used, batch_first=True).to(self.model.device)
        mask = pad_sequence([torch.ones_like(ids) for ids in used], batch_first=True).to(self.model.device)
        states = self.model(tokens, mask).last_hidden_state
        return [state[: len(ids)].clone() for state, ids in zip(states, used, strict=True)]


def _cut(ids: list[int], max_length: int) -> list[int]:
    """Shorten to at most that many tokens, the closing one among them."""
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], ids[-1]]


def clean_text(text: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice, as captions from the web need), collapse white space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()
