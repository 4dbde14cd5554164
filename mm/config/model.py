"""The shape of a Wan transformer, with the field names of the `predictor` section of pretrain_model.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mm.config.base import Section

Precision = Literal["fp32", "bf16", "fp16"]
ModelType = Literal["t2v", "i2v", "flf2v"]

IMAGES: dict[ModelType, int] = {"t2v": 0, "i2v": 1, "flf2v": 2}
"""Images that a video is made after: none, its first frame, its first and its last frame."""

_MOST = 2**20  # far beyond any model; what configurations of strangers say is built, on the meta device at least
_MOST_BLOCKS = 1000
_MOST_OF_A_PATCH = 64

MASK_CHANNELS = 4
"""Channels that tell the known frames: one for each of the frames that the VAE puts into a latent frame."""


class WanConfig(Section):
    """Shape of one Wan2.1 transformer. Defaults are what all published Wan2.1 models share.

    Attributes:
        model_type: the task family the weights belong to: text to video, and the same after one or two images.
        patch_size: latent frames, rows and columns that make one token.
        text_len: text tokens that cross attention sees; shorter captions are padded with zero vectors.
        text_dim: width of the text encoder's output.
        in_dim, out_dim: channels into the patch embedding and out of the head. With images in_dim is 2 out_dim + 4:
            noisy latents, then the mask of the known frames, then the latents of the known frames.
        img_dim: width of the image encoder's features; with images only.
        clip_token_len: tokens that the image encoder makes of one image; with images only.
        hidden_size: D; ffn_dim: width inside the feed-forward; num_heads: N; num_layers: number of blocks.
        freq_dim: width of the sinusoidal timestep embedding.
        qk_norm: RMSNorm over all heads on queries and keys; cross_attn_norm: affine LayerNorm before cross attention.
        eps: of all norms.
    """

    model_type: ModelType = "t2v"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = Field(512, ge=1, le=_MOST)
    text_dim: int = Field(4096, ge=1, le=_MOST)
    in_dim: int = Field(16, ge=1, le=_MOST)
    out_dim: int = Field(16, ge=1, le=_MOST)
    img_dim: int | None = Field(None, ge=1, le=_MOST)
    clip_token_len: int | None = Field(None, ge=1, le=_MOST)
    hidden_size: int = Field(ge=1, le=_MOST)
    ffn_dim: int = Field(ge=1, le=_MOST)
    num_heads: int = Field(ge=1, le=_MOST)
    num_layers: int = Field(ge=1, le=_MOST_BLOCKS)
    freq_dim: int = Field(256, ge=2, le=_MOST, multiple_of=2)
    qk_norm: Literal[True] = True
    cross_attn_norm: Literal[True] = True
    eps: float = Field(1e-6, gt=0)

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def image_dim(self) -> int:
        """Width of the image features; 0 without images."""
        return self.img_dim or 0

    @property
    def image_tokens(self) -> int:
        """Image tokens of a sample, of all its images; 0 without images."""
        return IMAGES[self.model_type] * (self.clip_token_len or 0)

    @property
    def noise_channels(self) -> int:
        """Channels of the noisy latents, which are what a sampler denoises."""
        return self.in_dim - self.condition_channels

    @property
    def condition_channels(self) -> int:
        """Channels of the mask and the latents of the known frames, behind the noisy ones; 0 without images."""
        return self.out_dim + MASK_CHANNELS if IMAGES[self.model_type] else 0

    def differing_fields(self, other: WanConfig) -> list[str]:
        """Fields in which weights of the two models differ.

        `text_len` and `clip_token_len` are none of them: how far captions are padded and how finely images are cut is
        a run's choice, and Hugging Face folders do not record it. (The learned positions of flf2v have a row for each
        image token; weights with another number of them differ in a tensor's shape.)
        """
        fields = (name for name in WanConfig.model_fields if name not in ("text_len", "clip_token_len"))
        return [name for name in fields if getattr(self, name) != getattr(other, name)]

    @model_validator(mode="after")
    def _heads_fit(self) -> WanConfig:
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must give an even whole head width"
            )
        if min(self.patch_size) < 1 or max(self.patch_size) > _MOST_OF_A_PATCH:
            raise ValueError(f"patch_size {self.patch_size} must be of numbers from 1 to {_MOST_OF_A_PATCH}")
        return self

    @model_validator(mode="after")
    def _images_fit(self) -> WanConfig:
        given = {"img_dim": self.img_dim, "clip_token_len": self.clip_token_len}
        if not IMAGES[self.model_type]:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} {value} has no effect in {self.model_type} models; remove it")
            if (self.in_dim, self.out_dim) == (36, 16):
                raise ValueError(f"in_dim 36 is that of i2v and flf2v models, and model_type is {self.model_type}")
            return self
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ValueError(
                f"{self.model_type} models need {' and '.join(missing)}; the released ones have img_dim 1280 and "
                "clip_token_len 257"
            )
        expected = 2 * self.out_dim + MASK_CHANNELS
        if self.in_dim != expected:
            raise ValueError(
                f"in_dim of {self.model_type} models with out_dim {self.out_dim} is {expected} ({self.out_dim} noisy, "
                f"{MASK_CHANNELS} mask and {self.out_dim} condition channels), not {self.in_dim}"
            )
        return self


IMG_DIM, CLIP_TOKEN_LEN = 1280, 257
"""Of the image encoder of every released model, CLIP ViT-H/14 at 224 pixels: 16 x 16 patches and one token more."""

WAN_1_3B = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40)


def _with_images(text_to_video: WanConfig, model_type: ModelType) -> WanConfig:
    """The released model of that size and task."""
    images = {"model_type": model_type, "in_dim": 36, "img_dim": IMG_DIM, "clip_token_len": CLIP_TOKEN_LEN}
    return WanConfig.model_validate({**text_to_video.model_dump(), **images})


WAN_I2V_1_3B = _with_images(WAN_1_3B, "i2v")
WAN_I2V_14B = _with_images(WAN_14B, "i2v")
WAN_FLF2V_14B = _with_images(WAN_14B, "flf2v")
