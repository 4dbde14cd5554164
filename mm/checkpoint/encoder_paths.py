"""The frozen encoders at a path: a folder of diffusers or transformers, or a file of the original release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mm.checkpoint.encoder_kinds import CLIP, T5, VAE, Encoder
from mm.checkpoint.encoder_models import load_encoder
from mm.checkpoint.encoders import open_encoder
from mm.checkpoint.identify import identify
from mm.config.model import Precision
from mm.config.run.encoders import TileBlend, Tiles
from mm.errors import DataError
from mm.wan.encoders import DTYPES, TextEncoder, VideoEncoder
from mm.wan.image_encoder import ImageEncoder
from mm.wan.tokenizer import open_tokenizer


def video_encoder(
    path: Path,
    dtype: Precision,
    device: torch.device,
    tiling: Tiles | None = None,
    blend: TileBlend = "neighbours",
) -> VideoEncoder:
    """The VAE, which encodes and decodes in these tiles.

    Raises:
        CheckpointError: CKPT-011, CKPT-021 and CKPT-023 for a file that is damaged or of no published sizes.
        DataError: DATA-040 to DATA-042 for a folder, DATA-045 for a file of something else.
    """
    model = _of_file(path, VAE, dtype, device)
    if model is None:
        return VideoEncoder.from_pretrained(path, dtype, device, tiling, blend)
    return VideoEncoder(model, tiling, blend)


def text_encoder(path: Path, tokenizer: Path, dtype: Precision, device: torch.device, max_tokens: int) -> TextEncoder:
    """UMT5 with its tokenizer; errors as `video_encoder`, and DATA-043."""
    model = _of_file(path, T5, dtype, device)
    if model is None:
        return TextEncoder.from_pretrained(path, tokenizer, dtype, device, max_tokens)
    return TextEncoder(model, open_tokenizer(tokenizer), max_tokens)


def image_encoder(path: Path, dtype: Precision, device: torch.device) -> ImageEncoder:
    """CLIP's visual half; errors as `video_encoder`."""
    model = _of_file(path, CLIP, dtype, device)
    return ImageEncoder(model) if model else ImageEncoder.from_pretrained(path, dtype, device)


def _of_file(path: Path, expected: Encoder, dtype: Precision, device: torch.device) -> Any | None:
    """The model in a file of the original release; None for a folder."""
    if not path.is_file():
        return None
    source = open_encoder(identify(path))
    if source is None or source.encoder is not expected or not source.original:
        found = f"{path} is no file of {expected.name} of the original release."
        raise DataError("DATA-045", found, f"Use its {expected.file}, or the folder of diffusers or transformers.")
    return load_encoder(source, DTYPES[dtype], device)
