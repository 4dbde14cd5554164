"""Check that encoders belong to a transformer: each gives what it was trained with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mm.config.model import WanConfig
from mm.errors import ConfigError, Problem, raise_all
from mm.wan.encoders import VideoEncoder, require_stride
from mm.wan.image_encoder import ImageEncoder


def require_text_fits(name: str, features: Tensor, wan: WanConfig) -> None:
    """CFG-066 for text features [L, width] of the encoder `name` that are not as wide as the transformer's."""
    _require_equal([(f"The width of {name}", features.shape[-1], "text_dim", wan.text_dim)])


def require_image_encoder_fits(name: str, encoder: ImageEncoder, wan: WanConfig) -> None:
    """CFG-066 for an image encoder of another width or number of tokens."""
    _require_equal(
        [
            (f"The width of {name}", encoder.width, "img_dim", wan.img_dim),
            (f"The number of tokens of {name}", encoder.num_tokens, "clip_token_len", wan.clip_token_len),
        ]
    )


def require_vae_fits(name: str, video: VideoEncoder, wan: WanConfig) -> None:
    """CFG-066 for a VAE of another number of channels, and DATA-260 for one of another stride."""
    channels = len(video.vae.config.latents_mean)
    _require_equal([(f"The number of channels of {name}", channels, "out_dim", wan.out_dim)])
    require_stride(name, video, wan.task)


def _require_equal(parts: Sequence[tuple[str, int, str, int | None]]) -> None:
    """Refuse parts of different models: (what was found, its number, the predictor's field, that one's number)."""
    problems = [
        Problem("CFG-066", f"{what} is {found}, and predictor.{name} is {expected}.", "Use the parts of one model.")
        for what, found, name, expected in parts
        if found != expected
    ]
    raise_all(ConfigError, problems)
