"""What the transformer is given of a row: text features and the latents of a given video.

The features that the model's task declares are made in `mm.generate.sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.config.inference import InferenceModel
from mm.errors import ConfigError, Problem, raise_all
from mm.generate.media_inputs import load_image, load_video
from mm.generate.rows import GenerationRow
from mm.wan.encoders import TextEncoder, VideoEncoder


def encode_text(
    config: InferenceModel, rows: Sequence[GenerationRow], device: torch.device
) -> tuple[dict[int, Tensor], Tensor | None]:
    """Features [L, text_dim] of each row's prompt by its index, and, where guidance uses it, of the negative prompt.

    One text at a time, so that features do not depend on their neighbours, and on the CPU: the encoder is dropped
    afterwards and leaves the device to the transformer.

    Raises:
        DataError: DATA-040 to DATA-043, see `TextEncoder.from_pretrained`.
    """
    encoder = TextEncoder.from_pretrained(
        Path(config.text_encoder.from_pretrained),
        Path(config.tokenizer.from_pretrained),
        config.text_encoder.dtype,
        device,
        config.tokenizer.model_max_length,
    )
    negative = encoder.encode([config.negative_text])[0].cpu() if config.diffusion.guided else None
    return {row.index: encoder.encode([row.prompt])[0].cpu() for row in rows}, negative


def require_equal(parts: Sequence[tuple[str, int, str, int | None]]) -> None:
    """Refuse parts of different models: (what was found, its number, the predictor's field, that one's number).

    Raises:
        ConfigError: CFG-066.
    """
    problems = [
        Problem("CFG-066", f"{what} is {found}, and predictor.{name} is {expected}.", "Use the parts of one model.")
        for what, found, name, expected in parts
        if found != expected
    ]
    raise_all(ConfigError, problems)


def video_latents(config: InferenceModel, video: VideoEncoder, rows: Sequence[GenerationRow]) -> Tensor:
    """Latents of the given videos of each row, [B, C, F, H, W].

    Raises:
        DataError: what `load_video` raises, DATA-044 for a VAE that is not Wan's.
    """
    return video.encode(torch.stack([load_given_video(config, row) for row in rows]))


def check_given(config: InferenceModel, row: GenerationRow) -> None:
    """Read all that a row names, so that hours of work do not end at a damaged file.

    Raises:
        DataError: what `load_image` and `load_video` raise.
    """
    _, height, width = config.pipeline_config.input_size
    for path in row.images:
        load_image(path, height, width)
    if row.video is not None:
        load_given_video(config, row)


def load_given_video(config: InferenceModel, row: GenerationRow) -> Tensor:
    """The frames of a row's video, [3, F, H, W] pixels in [-1, 1]; raises what `load_video` raises."""
    if row.video is None:
        raise ValueError("the row has no video")
    return load_video(row.video, config.pipeline_config.start_frame or 0, *config.pipeline_config.input_size)
