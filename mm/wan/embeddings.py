"""The modules that features of a task go through before they enter the model, by the names that declarations use.

A module gets one feature, [B, *shape], of any dtype, and gives [B, I, D] or [B, T, D] tokens or a [B, 6, D] change of
the time modulation, as the feature's entry says. Those of latents get patches, and those of what is added to the
video's tokens a list, one for each run of tokens.
Shapes: B batch, I image tokens, T video tokens, C latent channels, H W latent height and width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.wan.camera_adapter import CameraAdapter
from mm.wan.layers import Fp32LayerNorm, ModuleFactories
from mm.wan.motion_controller import MotionController


class PatchEmbedding(nn.Module):
    """A linear on patches, whose weight has the shape that Wan's files give it: that of a convolution.

    Args:
        channels: into it. width: D. patch_size: sides of a patch, of two or three axes.
    """

    def __init__(self, channels: int, width: int, patch_size: Sequence[int]) -> None:
        super().__init__()
        # init_weights or a file fills them
        self.weight = nn.Parameter(torch.zeros(width, channels, *patch_size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, patches: Tensor) -> Tensor:
        """[B, T, pt*ph*pw*C] in the layout of `mm.wan.patches.patchify` to [B, T, D] in the weight's dtype."""
        channel_last = self.weight.movedim(1, -1).flatten(1)
        return F.linear(patches.to(self.weight.dtype), channel_last, self.bias)


def _reference_embedding(config: WanConfig, parts: ModuleFactories) -> nn.Module:
    """Embedding of one image's latents. Source: VideoX-Fun's Wan2.1-Fun-V1.1-Control models."""
    del parts
    return PatchEmbedding(config.out_dim, config.hidden_size, config.patch_size[1:])


def _side_embedding(config: WanConfig, parts: ModuleFactories) -> nn.Module:
    del parts
    return PatchEmbedding(config.side_channels, config.hidden_size, config.patch_size)


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
    "ref_conv": _reference_embedding,
    "control_adapter": CameraAdapter,
    "vace_patch_embedding": _side_embedding,
}
"""By `InputFeature.module`, which is the module's name in the model too."""
