"""The module that turns the rays of a camera's pixels into a change of the video's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mm.config.model import WanConfig
from mm.config.tasks.fun import PIXELS_OF_A_LATENT
from mm.config.tasks.fun_camera import RAY_CHANNELS
from mm.wan.layers import ModuleFactories


class ResidualBlock(nn.Module):
    """Convolution, ReLU, convolution, added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D, rows, columns] to the same."""
        out: Tensor = self.conv2(F.relu(self.conv1(x)))
        return out + x


class CameraAdapter(nn.Module):
    """Pixels of a latent into channels, a convolution that makes tokens, one residual block; each latent frame alone.

    Source: VideoX-Fun's Wan2.1-Fun-V1.1-Control-Camera models.
    """

    def __init__(self, config: WanConfig, parts: ModuleFactories) -> None:
        del parts
        super().__init__()
        _, rows, columns = config.patch_size
        self.conv = nn.Conv2d(
            RAY_CHANNELS * PIXELS_OF_A_LATENT**2, config.hidden_size, (rows, columns), stride=(rows, columns)
        )
        self.residual_blocks = nn.ModuleList([ResidualBlock(config.hidden_size)])

    def forward(self, rays: Sequence[Tensor]) -> list[Tensor]:
        """[B, 24, F, 8 H, 8 W] of any dtype to [B, T, D] in the weight's dtype, tokens row major, of each."""
        return [self._tokens(each) for each in rays]

    def _tokens(self, rays: Tensor) -> Tensor:
        batch = len(rays)
        frames = rays.to(self.conv.weight.dtype).transpose(1, 2).flatten(0, 1)
        hidden = self.conv(F.pixel_unshuffle(frames, PIXELS_OF_A_LATENT))
        for block in self.residual_blocks:
            hidden = block(hidden)
        return hidden.flatten(2).transpose(1, 2).reshape(batch, -1, hidden.shape[1])
