"""The shape of a Wan transformer, with the field names of the `predictor` section of pretrain_model.json."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mm.config.base import Section

Precision = Literal["fp32", "bf16", "fp16"]


class WanConfig(Section):
    """Shape of one Wan2.1 transformer. Defaults are what all published Wan2.1 models share.

    Attributes:
        model_type: the task family the weights belong to.
        patch_size: latent frames, rows and columns that make one token.
        text_len: text tokens that cross attention sees; shorter captions are padded with zero vectors.
        text_dim: width of the text encoder's output.
        in_dim, out_dim: latent channels into the patch embedding and out of the head.
        hidden_size: D; ffn_dim: width inside the feed-forward; num_heads: N; num_layers: number of blocks.
        freq_dim: width of the sinusoidal timestep embedding.
        qk_norm: RMSNorm over all heads on queries and keys; cross_attn_norm: affine LayerNorm before cross attention.
        eps: of all norms.
    """

    model_type: Literal["t2v"] = "t2v"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = Field(512, ge=1)
    text_dim: int = Field(4096, ge=1)
    in_dim: int = Field(16, ge=1)
    out_dim: int = Field(16, ge=1)
    hidden_size: int = Field(ge=1)
    ffn_dim: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    freq_dim: int = Field(256, ge=2, multiple_of=2)
    qk_norm: Literal[True] = True
    cross_attn_norm: Literal[True] = True
    eps: float = Field(1e-6, gt=0)

    @property
    def head_dim(self) -> int:
        """K, the width of one attention head."""
        return self.hidden_size // self.num_heads

    def differing_fields(self, other: WanConfig) -> list[str]:
        """Fields in which weights of the two models differ.

        `text_len` is none of them: how far captions are padded is a run's choice, and Hugging Face folders do not
        record it.
        """
        fields = (name for name in WanConfig.model_fields if name != "text_len")
        return [name for name in fields if getattr(self, name) != getattr(other, name)]

    @model_validator(mode="after")
    def _heads_fit(self) -> WanConfig:
        if self.hidden_size % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must give an even whole head width"
            )
        if min(self.patch_size) < 1:
            raise ValueError(f"patch_size {self.patch_size} must be positive")
        return self


WAN_1_3B = WanConfig(hidden_size=1536, ffn_dim=8960, num_heads=12, num_layers=30)
WAN_14B = WanConfig(hidden_size=5120, ffn_dim=13824, num_heads=40, num_layers=40)
