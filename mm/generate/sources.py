"""What makes the features of a row that the model's task declares, one function for each `mm.config.tasks.task.Source`.

Encoders that nothing else needs run before the transformer is there, one after the other, and leave the device to it;
what the VAE makes waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.config.inference import InferenceModel
from mm.config.tasks.task import InputFeature, Source
from mm.generate.inputs import require_equal
from mm.generate.media_inputs import load_image
from mm.generate.rows import GenerationRow
from mm.wan.condition import condition_latents
from mm.wan.encoders import VideoEncoder
from mm.wan.image_encoder import ImageEncoder

Early = Mapping[str, Mapping[int, Tensor]]
"""Features [*shape] of rows, by the feature's name and the row's index, on the CPU."""


def encode_early(config: InferenceModel, rows: Sequence[GenerationRow], device: torch.device) -> Early:
    """The features that need no VAE.

    Raises:
        ConfigError: CFG-066 for an encoder of another model.
        DataError: DATA-040 to DATA-042 for one that cannot be loaded, and what `load_image` raises.
    """
    return {
        feature.name: _EARLY[feature.source](config, feature, rows, device)
        for feature in config.predictor.task.features
        if feature.source in _EARLY
    }


def row_features(
    config: InferenceModel, early: Early, video: VideoEncoder, rows: Sequence[GenerationRow], device: torch.device
) -> dict[str, Tensor]:
    """All features of some rows, [B, *shape] by name, on the device.

    Raises:
        DataError: what `load_image` raises, DATA-044 for a VAE that is not Wan's.
    """
    found = {}
    for feature in config.predictor.task.features:
        if feature.source in _EARLY:
            found[feature.name] = torch.stack([early[feature.name][row.index] for row in rows]).to(device)
        else:
            found[feature.name] = _WITH_VAE[feature.source](config, video, rows)
    return found


def _image_features(
    config: InferenceModel, feature: InputFeature, rows: Sequence[GenerationRow], device: torch.device
) -> Mapping[int, Tensor]:
    """[I, img_dim], one image at a time.

    A model that was made for one image sees the first one alone; the last one reaches it through its latents.
    """
    del feature
    section, predictor = config.image_encoder, config.predictor
    assert section is not None  # noqa: S101  the rules refuse such a task without it
    folder = section.from_pretrained
    encoder = ImageEncoder.from_pretrained(Path(folder), section.dtype, device)
    require_equal(
        [
            (f"The width of {folder}", encoder.width, "img_dim", predictor.img_dim),
            (f"The number of tokens of {folder}", encoder.num_tokens, "clip_token_len", predictor.clip_token_len),
        ]
    )
    _, height, width = config.pipeline_config.input_size
    seen = len(predictor.task.frames)
    return {
        row.index: torch.cat(
            [encoder.encode(load_image(path, height, width).unsqueeze(0))[0] for path in row.images[:seen]]
        ).cpu()
        for row in rows
    }


def _column(
    config: InferenceModel, feature: InputFeature, rows: Sequence[GenerationRow], device: torch.device
) -> Mapping[int, Tensor]:
    """The number, fp32, without axes."""
    del config, device
    return {row.index: torch.tensor(row.columns[feature.name]) for row in rows}


def _known_frames(config: InferenceModel, video: VideoEncoder, rows: Sequence[GenerationRow]) -> Tensor:
    """Mask and latents of the given frames of each row, [B, 4 + C, F, H, W]."""
    num_frames, height, width = config.pipeline_config.input_size
    images = [[load_image(path, height, width) for path in row.images] for row in rows]
    indices = [frame.index for frame in config.row_task.frames]
    given = {index: torch.stack([of_row[which] for of_row in images]) for which, index in enumerate(indices)}
    return condition_latents(video, given, num_frames)


EarlyMaker = Callable[[InferenceModel, InputFeature, Sequence[GenerationRow], torch.device], Mapping[int, Tensor]]
_EARLY: dict[Source, EarlyMaker] = {
    Source.IMAGE_ENCODER: _image_features,
    Source.COLUMN: _column,
}
_WITH_VAE: dict[Source, Callable[[InferenceModel, VideoEncoder, Sequence[GenerationRow]], Tensor]] = {
    Source.KNOWN_FRAMES: _known_frames,
}
