"""The modules that features of a task go through before they enter the model, by the names that declarations use.

A module gets one feature, [B, *shape], of any dtype, and gives [B, I, D] tokens or a [B, 6, D] change of the time
modulation, as the feature's entry says. Shapes: B batch, I image tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.wan.layers import Fp32LayerNorm, ModuleFactories
from mm.wan.motion_controller import MotionController


class ImageEmbedding(nn.Module):
    """LayerNorm, linear, GELU, linear, LayerNorm on the image encoder's features of any dtype.

    Models of two images add learned positions first, which tell the images apart.

    Source: the released I2V and FLF2V weights; the exact GELU and an eps of 1e-5 as diffusers' `WanImageEmbedding`.
    """

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        super().__init__()
        width = config.image_dim
        self.proj = nn.Sequential(
            Fp32LayerNorm(width, eps=1e-5),
            parts.linear(width, width),
            nn.GELU(),
            parts.linear(width, config.hidden_size),
            Fp32LayerNorm(config.hidden_size, eps=1e-5),
        )
        self.has_positions = config.task.positions
        if self.has_positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, config.image_tokens, width))

    def forward(self, features: Tensor) -> Tensor:
        """[B, I, image_dim] to [B, I, D] in the dtype of the linears."""
        features = features.to(self.proj.get_parameter("1.weight").dtype)  # the norms' may be another
        out: Tensor = self.proj(features + self.emb_pos if self.has_positions else features)
        return out


EMBEDDINGS: dict[str, Callable[[WanConfig, ModuleFactories], nn.Module]] = {
    "img_emb": ImageEmbedding,
    "motion_controller": MotionController,
}
"""By `InputFeature.module`, which is the module's name in the model too."""
